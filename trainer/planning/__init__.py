"""What a run will need, worked out before it is queued: memory, traffic, time, and what would have to change to fit.

``setting`` holds what a plan is made for, ``memory`` and ``activations`` say what a rank allocates, ``traffic`` what it
sends, ``plan`` puts them together, and ``simulation`` takes real steps as one of many ranks that are not there.
"""
