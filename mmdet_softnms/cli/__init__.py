"""The commands: ``python -m mmdet_softnms reevaluate|reproduce|export|benchmark``, one module each.

Nothing here imports more than the standard library before a command line has been read: ``--help`` and misspelt
options are answered at once.
"""
