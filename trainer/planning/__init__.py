"""What a run will need, worked out before it is queued: memory, traffic, time, and what would have to change to fit.

``setting`` holds what a plan is made for, ``backbones``, ``memory`` and ``activations`` say what a rank allocates,
``traffic`` what it sends, ``plan`` puts them together, and ``simulation`` runs real updates as one rank of a simulated
job.
"""
