"""Rules about the layout of the code: folders are layers, and imports go downward."""

import ast
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]

# The layers, lowest first: a module may import from its own folder and from those above it here.
LAYERS = (
    "errors",
    "runtime",
    "moe",
    "config",
    "model",
    "study",
    "data",
    "training",
    "planning",
    "evaluation",
    "sweeps",
    "report",
    "cli",
)


def find_modules() -> dict[str, pathlib.Path]:
    """Returns {dotted name: file} of every module of the package."""
    paths = (ROOT / "modse_jax").rglob("*.py")
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}


def list_imports(path: pathlib.Path) -> Iterator[str]:
    """Yields the dotted name of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def find_layer(module: str) -> str:
    return module.split(".")[1]


def test_imports_between_folders_go_downward():
    modules = find_modules()
    upward = []
    for module, path in modules.items():
        if module in ("modse_jax.__init__", "modse_jax.__main__"):
            continue
        for imported in list_imports(path):
            if not imported.startswith("modse_jax."):
                continue
            layers = find_layer(imported), find_layer(module)
            assert set(layers) <= set(LAYERS), f"{module} imports {imported}, in no layer"
            if LAYERS.index(layers[0]) > LAYERS.index(layers[1]):
                upward.append(f"{module} imports {imported}")
    assert len(modules) > 20 and not upward


def test_own_modules_are_imported_without_an_alias():
    aliased = []
    for folder in ("modse_jax", "benchmarks", "tests", "configs"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("modse_jax"):
                    aliased += [f"{path}: {a.name}" for a in node.names if a.asname]
    assert not aliased


def test_text_files_are_opened_with_an_encoding():
    """Without one, the encoding is that of the locale, which is ASCII with LC_ALL=C."""
    missing = []
    for module, path in find_modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and opens_text_without_encoding(node):
                missing.append(f"{module}, line {node.lineno}: {ast.unparse(node)}")
    assert not missing


def opens_text_without_encoding(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    arguments = [*call.args, *(k.value for k in call.keywords)]
    texts = [a.value for a in arguments if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    is_binary = any(text in ("rb", "wb", "ab") for text in texts)
    is_descriptor = ast.unparse(call.func) == "os.open"
    opens = name in ("read_text", "write_text") or (
        name in ("open", "fdopen") and not is_descriptor
    )
    return opens and not is_binary and all(k.arg != "encoding" for k in call.keywords)


def test_only_three_modules_use_shard_map():
    """Everything else is sharded by XLA, from the shardings of its arguments."""
    found = {name for name, path in find_modules().items() if "shard_map(" in path.read_text()}
    assert found == {
        "modse_jax.moe.layer",
        "modse_jax.model.attention.attention_layer",
        "modse_jax.model.embedding",
    }


def test_no_module_imports_pickle():
    """Files of a run are data: loading one never runs code from it."""
    for module, path in find_modules().items():
        imported = {name.split(".")[0] for name in list_imports(path)}
        assert not imported & {"pickle", "dill", "cloudpickle", "joblib"}, module
