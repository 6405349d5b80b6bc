"""The commands: ``python -m mmdet_softnms reevaluate|reproduce|export|benchmark``, one module each."""
