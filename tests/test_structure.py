"""The house: which room may import which. `PYTHONPATH=. python tests/test_structure.py` prints it, with lines."""

import ast
import subprocess
import sys
from pathlib import Path

from llb.detectors import DETECTORS

ROOT = Path(__file__).resolve().parent.parent
# Every file of the core, from the bottom up. A file may import only from files to the left of it, and above.
CORE = """
    files flags console processes lock times runfiles device
    cache metrics keep threshold pictures pages tiles charts tree pairing recognise layouts lists images masks data demo
    maps tables marks unseen learning figures compare looks quarantine review sheet
    encoders.specs encoders.stem encoders.pickles encoders.vit encoders.cnn encoders.weights encoders
    detectors.common detectors.layers detectors.recipes detectors.decoder detectors.dinomaly detectors.released
    detectors.padim detectors.student detectors.subspace detectors.banks detectors.patchcore detectors.softpatch
    detectors.mutual detectors.rd detectors.uniad detectors.simplenet detectors.cflow detectors.damage
    detectors.destseg detectors
    protocols purify config defaults features placement checkpoint train fit head score manifest run
    borrow selection stage report new_images next_page
""".split()
ORDER = [
    "llb",
    *(f"llb.{name}" for name in CORE),
    "stage1_partition",
    "stage2_train",
    "evaluate",
    "llb.presets",
    "llb.ablate",
    "llb.dropping",
]
LARGEST_FILE, MOST_ARGUMENTS = 350, 6
LARGEST_DETECTOR = dict.fromkeys(DETECTORS, 150) | {"dinomaly": 250, "uniad": 250, "destseg": 250}
FORBIDDEN = {"llb.detectors": ("llb.run", "llb.report", "llb.data")}
FORBIDDEN |= dict.fromkeys(("llb.tables", "llb.pictures", "llb.learning", "llb.figures"), ("jax",))


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def files() -> dict[str, Path]:
    return {module_name(file): file for file in [*ROOT.glob("*.py"), *(ROOT / "llb").rglob("*.py")]}


def imports(file: Path, names) -> set[str]:
    """The modules that a file imports: the project's own by their full name, others by their first part."""
    imported = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                imported.add(inner if inner in names else node.module)
    return {name if name in names else name.split(".")[0] for name in imported} - {"llb"}


def test_every_file_of_the_core_has_a_place_in_the_order():
    core = {name for name in files() if not name.startswith(("llb.tiny", "llb.bench"))}
    assert core == set(ORDER) and len(set(ORDER)) == len(ORDER)


def test_no_file_imports_upwards_and_the_core_imports_neither_workshop():
    known = files()
    for name, file in known.items():
        for other in imports(file, known):
            if name in ORDER and name != "llb" and other in known:
                assert other in ORDER, f"{name} is of the core and imports {other}"
                assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}, which is above it"
            assert not any(name.startswith(room) and other.startswith(barred) for room, barred in FORBIDDEN.items()), (
                name
            )


def test_the_workshops_have_no_circle():
    known = files()
    graph = {name: imports(file, known) & known.keys() for name, file in known.items()}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' → '.join([*path, name])}"
        for other in graph[name]:
            if other.startswith(("llb.tiny", "llb.bench")):
                visit(other, (*path, name))

    for name in graph:
        if name.startswith(("llb.tiny", "llb.bench")):
            visit(name, ())


def test_files_and_calls_are_short():
    for name, file in files().items():
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= LARGEST_FILE, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
                assert len([a for a in arguments if a != "self"]) <= MOST_ARGUMENTS, f"{name}: {node.name}"


def test_a_detector_can_be_read_in_one_sitting():
    for name, file in files().items():
        most = LARGEST_DETECTOR.get(
            name.removeprefix("llb.detectors."), 300 if name == "llb.encoders.cnn" else LARGEST_FILE
        )
        assert len(file.read_text(encoding="utf-8").splitlines()) <= most, name


def test_commands_that_only_look_at_a_run_load_without_jax():
    code = "import sys, llb.compare, llb.quarantine, llb.review; assert not {'jax', 'matplotlib'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


if __name__ == "__main__":
    for name, file in sorted(files().items(), key=lambda item: ORDER.index(item[0]) if item[0] in ORDER else 999):
        own = sorted(other.removeprefix("llb.") for other in imports(file, files()) if other in files())
        print(f"{len(file.read_text(encoding='utf-8').splitlines()):4}  {name:24} {' '.join(own)}")
