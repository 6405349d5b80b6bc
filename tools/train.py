"""mmdet's own ``tools/train.py``, flags unchanged; see tools/_mmdet_script.py for what is added."""

from _mmdet_script import run

if __name__ == '__main__':
    run('train.py')
