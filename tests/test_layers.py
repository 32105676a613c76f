"""The import directions of the design, read from the source, not from what happens to load."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "xsave"

LEAVES = {
    "xsave.errors",
    "xsave.frames",
    "xsave.progress",
    "xsave.public",
    "xsave.vectors",
    "xsave.behind",
    "xsave.distinct",
    "xsave.filelock",
}
#: What the flows are made of.
FLOW = {"xsave.image", "xsave.canonical", "xsave.guest.xen.domctl"}
#: What a layer may import beside the leaves and itself. The first prefix that fits a module is
#: its layer.
LAYERS = {
    "xsave.cli": {"xsave", "xsave.commands", "xsave.console"},
    "xsave.__main__": {"xsave.cli"},
    "xsave.commands": {
        "xsave.console",
        "xsave.save",
        "xsave.restore",
        "xsave.lazy",
        "xsave.postponed",
        "xsave.migrate",
        "xsave.receive",
        "xsave.precopy",
        "xsave.compare",
        "xsave.image",
        "xsave.host",
        "xsave.guest.xen.domctl",
        "xsave.guest.xen.cpuid",
        "xsave.torture",
    },
    # The proof drives everything from above, as a command does.
    "xsave.torture": {
        "xsave.save",
        "xsave.restore",
        "xsave.host",
        "xsave.image",
        "xsave.guest.xen",
    },
    "xsave.console": set(),
    "xsave.receive": {"xsave.restore", "xsave.postponed", "xsave.host", "xsave.guest.xen.domctl"},
    "xsave.migrate": {
        "xsave.save",
        "xsave.live",
        "xsave.postcopy",
        "xsave.precopy",
        "xsave.rounds",
        "xsave.host",
        "xsave.guest.xen.domctl",
    },
    "xsave.postcopy": FLOW,
    "xsave.precopy": set(),
    "xsave.rounds": {"xsave.live", "xsave.precopy", "xsave.guest.xen.domctl"},
    "xsave.live": FLOW
    | {"xsave.save", "xsave.p2m", "xsave.view", "xsave.gathering", "xsave.skipping"}
    | {"xsave.guest.xen.logdirty"},
    "xsave.skipping": {"xsave.guest.xen.logdirty"},
    "xsave.save": FLOW | {"xsave.p2m", "xsave.view", "xsave.gathering"},
    "xsave.gathering": FLOW,
    "xsave.restore": FLOW
    | {"xsave.guest.xen.cpuid", "xsave.p2m", "xsave.parts", "xsave.placing", "xsave.settling"}
    | {"xsave.domconfig", "xsave.lazy", "xsave.postponed"},
    "xsave.domconfig": {"xsave.image"},
    "xsave.parts": {"xsave.image"},
    "xsave.placing": FLOW,
    "xsave.lazy": FLOW | {"xsave.placing", "xsave.guest.xen.outstanding"},
    "xsave.postponed": FLOW | {"xsave.placing", "xsave.guest.xen.outstanding"},
    "xsave.settling": FLOW | {"xsave.parts", "xsave.placing", "xsave.localising"},
    "xsave.localising": FLOW | {"xsave.placing"},
    "xsave.p2m": {"xsave.canonical", "xsave.guest.xen.domctl"},
    "xsave.view": {"xsave.p2m", "xsave.guest.xen.domctl"},
    "xsave.compare": {"xsave.canonical", "xsave.p2m", "xsave.view", "xsave.guest.xen.domctl"},
    "xsave.canonical": {"xsave.guest.xen.pagetable"},
    "xsave.image": set(),
    "xsave.guest.xen": set(),
    "xsave.guest": set(),
    # channel.py carries images: it knows their buffers and the frames of seekable zstd.
    "xsave.host": {
        "xsave.guest.xen",
        "xsave.image.buffers",
        "xsave.image.zstdseek",
        "xsave.image.postwire",  # and brings a migration's pages
    },
    "xsave": set(),
}
#: Who alone may import what.
ONLY = {
    "rich": {"xsave.console"},
    "unicorn": {"xsave.guest.xen.vcpu"},
    "construct": {"xsave.image.record", "xsave.host.handshake"},
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules():
    """Return {module name: its syntax tree}."""
    return {module_name(p): ast.parse(p.read_text(), str(p)) for p in PACKAGE.rglob("*.py")}


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes_run(tree, *, at_import):
    """Yield nodes but those under TYPE_CHECKING; `at_import`: nor those in function bodies."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        if is_type_checking(node):
            todo += node.orelse
        elif not (
            at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        ):
            todo += ast.iter_child_nodes(node)


def resolve(node, known):
    """Return the modules an import statement names; `from package import module` included."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, f"relative import of {node.module}"
    below = [f"{node.module}.{alias.name}" for alias in node.names]
    found = [name for name in below if name in known]
    return found if len(found) == len(below) else [node.module, *found]


@cache
def imports_of(module, *, at_import=False):
    """Return the names `module` imports; annotations under TYPE_CHECKING do not count."""
    tree = modules()[module]
    return frozenset(
        name
        for node in nodes_run(tree, at_import=at_import)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in resolve(node, modules())
    )


def within(name, package):
    return name == package or name.startswith(package + ".")


def layer_of(module):
    fits = [prefix for prefix in LAYERS if within(module, prefix)]
    return max(fits, key=len)


def violations(module, imported):
    """Return what `module` imports and may not."""
    if module in LEAVES:
        return [name for name in imported if within(name, "xsave")]
    layer = layer_of(module)
    return [
        name
        for name in imported
        if within(name, "xsave")
        and name not in LEAVES
        and (layer == "xsave" or layer_of(name) != layer)
        and not any(within(name, allowed) for allowed in LAYERS[layer] if allowed != "xsave")
        and not (name == "xsave" and "xsave" in LAYERS[layer])
    ]


@pytest.mark.parametrize("module", sorted(modules()))
def test_import_direction(module):
    """A module imports its own layer, the leaves, and the layers its own may see."""
    assert violations(module, imports_of(module)) == []


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("xsave.errors", "xsave.frames"),
        ("xsave.image.stream", "xsave.guest.xen.machine"),
        ("xsave.guest.xen.machine", "xsave.image.stream"),
        ("xsave.save", "xsave.restore"),
        ("xsave.save", "xsave.guest.xen.machine"),
        ("xsave.guest.xen.domain", "xsave.guest.kernel"),
        ("xsave.host.host", "xsave.save"),
        ("xsave.console", "xsave.cli"),
        ("xsave.canonical", "xsave.guest.xen.domctl"),
    ],
)
def test_a_wrong_direction_is_seen(module, imported):
    """The check above can fail."""
    assert violations(module, [imported]) == [imported]


def cycles(graph):
    """Return the strongly connected sets of more than one module (Tarjan)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_no_cycles():
    """No import cycle anywhere, also not through imports inside functions."""
    graph = {m: [n for n in imports_of(m) if n in modules() and n != m] for m in modules()}
    assert cycles(graph) == []


def test_a_cycle_is_seen():
    """The check above can fail."""
    assert cycles({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]}) == [["a", "b", "c"]]


@pytest.mark.parametrize(("library", "allowed"), ONLY.items())
def test_one_door(library, allowed):
    """rich, unicorn and construct are each imported by one module (construct by two)."""
    users = {m for m in modules() if any(within(n, library) for n in imports_of(m))}
    assert users <= allowed
    assert users


def test_commands_import_lazily():
    """No command module pulls in a flow, a host or numpy before its command runs."""
    heavy = ("xsave.image", "xsave.host", "xsave.guest", "xsave.save", "xsave.restore", "numpy")
    for module in modules():
        if within(module, "xsave.commands") or module in ("xsave.cli", "xsave.console"):
            eager = imports_of(module, at_import=True)
            assert not [n for n in eager if any(within(n, h) for h in heavy)], module
