"""Every module has its tests: those of ``mmdet_softnms/a/b/name.py`` are in ``tests/test_a/test_name.py``."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Modules without a test file of their own: what tests them, and why there. Paths below ``tests``.
ELSEWHERE = {
    '__main__': ('test_cli/test_arguments.py', 'three lines, run as a command'),
    'roi_heads': ('test_models/test_roi_heads.py', 'the public names of models.roi_heads'),
    'cli/benchmark': ('test_benchmarks/test_benchmarks.py', 'hands its arguments to benchmarks/'),
    'cli/export': ('test_export.py', 'the command around export'),
    'cli/main': ('test_cli/test_arguments.py', 'chooses a command by its name'),
    'cli/reevaluate': ('test_tools/test_reevaluate.py', 'run as the tool that users run'),
    'cli/reproduce': ('test_tools/test_reproduce.py', 'run as the tool that users run'),
    'models/detectron2_wrapper': ('test_detectron2.py', 'needs Detectron2, in a process of its own'),
    'models/places': ('test_models/test_roi_heads.py', 'configs with a rule in every place'),
    'models/takes_rules': ('test_models/test_dense_heads.py', 'what dense and RoI heads share'),
    'ops/_batch': ('test_ops/test_operator.py', 'one public function beside the operator'),
    'ops/_compiled': ('test_ops/test_cpu_path.py', 'kernels with and without a disk cache'),
    'ops/_cpu': ('test_ops/test_cpu_path.py', 'what only this path does; test_soft_nms has the rest'),
    'ops/_derivative': ('test_ops/test_weights.py', 'derivatives of weights'),
    'ops/_dispatch': ('test_ops/test_operator.py', 'two functions of the operator'),
    'ops/_reference': ('test_ops/test_soft_nms.py', 'the oracle is tested with what it is the oracle of'),
    'ops/_eager': ('test_ops/test_cpu_path.py', 'a second way of this path to the same bits'),
    'ops/_neighbours': ('test_ops/test_voting.py', 'kernels of votes and support'),
    'ops/_rotated_cpu': ('test_ops/test_rotated.py', 'the kernel of rotated boxes'),
    'ops/_triton_kernels': ('test_ops/test_triton.py', 'the kernels of ops/_triton'),
    'reevaluation/candidates/forward': ('test_reevaluation/test_store.py', 'what it leaves is a store'),
    'reevaluation/candidates/plug': ('test_reevaluation/test_run.py', 'plugged detectors, run live and stored'),
    'reevaluation/candidates/test_set': ('test_reevaluation/test_fingerprint.py', 'test sets and what identifies them'),
    'reevaluation/candidates/views': ('test_reevaluation/test_dense.py', 'stored views against a live run of them'),
    'reevaluation/choice/plan': ('test_tools/test_reevaluate.py', 'needs configs with a val set on disk'),
    'reevaluation/report/export_table': ('test_reevaluation/test_table.py', 'the same rows in other formats'),
    'reevaluation/report/verdict': ('test_reevaluation/test_table.py', 'what stands above and below the table'),
    'reevaluation/report/why': ('test_reevaluation/test_errors.py', 'lines made of scoring/errors'),
    'reevaluation/reproduction': ('test_tools/test_reproduce.py', 'run as the tool that users run'),
    'reevaluation/result': ('test_reevaluation/test_report.py', 'what a report is made of'),
    'reevaluation/scoring/evaluators': ('test_reevaluation/test_stock_evaluators.py', "mmdet's evaluators beside ours"),
}


def modules() -> list[str]:
    """Every module but the packages themselves, which hold names and no code."""
    package = ROOT / 'mmdet_softnms'
    paths = (path.relative_to(package).with_suffix('') for path in package.rglob('*.py'))
    return sorted(path.as_posix() for path in paths if path.name != '__init__' and '.mim' not in path.parts)


def test_file(module: str) -> Path:
    *folders, name = module.split('/')
    folder = ROOT / 'tests' / (f'test_{folders[0]}' if folders else '')
    return folder / f'test_{name.removeprefix("_")}.py'


test_file.__test__ = False  # type: ignore[attr-defined]  # not a test


@pytest.mark.parametrize('module', modules())
def test_every_module_has_its_tests(module: str) -> None:
    if module in ELSEWHERE:
        assert not test_file(module).exists(), f'take {module} out of ELSEWHERE: it has a test file of its own now'
        file, _ = ELSEWHERE[module]
        assert (ROOT / 'tests' / file).is_file()
    else:
        assert test_file(module).is_file(), f'write {test_file(module).relative_to(ROOT)}, or say in ELSEWHERE why not'


def test_exceptions_are_modules() -> None:
    assert set(ELSEWHERE) <= set(modules())
