"""Re-evaluation: one forward pass of the network, every suppression scored on what it gave.

``run`` orchestrates. The folders are its stages, each importing only from those before it: ``candidates`` (plug, test
set, fingerprint, forward pass, store), ``scoring`` (settings, sweep, metrics, matching), ``choice`` (plan, resampling,
selection), ``report`` (table, figures, pictures, page). ``reproduction`` holds published numbers against a result.
"""
