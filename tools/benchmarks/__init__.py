"""The benchmarks of `lce bench`: one file each, with HELP, add_arguments and run like a subcommand."""
