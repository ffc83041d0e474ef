"""What the API pages show: every member of a class that a user calls, wherever it is defined.

- The template of classes lists :func:`user_members`, inherited ones too.
- Docstrings are read as numpydoc writes them where napoleon reads a type into prose.
- Classes are named and linked as users import them, not by the private module that defines them.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

import pertura

if TYPE_CHECKING:
    from docutils.nodes import Element
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

SCVI_MEMBERS = frozenset(
    {
        "adata",
        "device",
        "history",
        "is_trained",
        "load",
        "save",
        "setup_anndata",
        "test_indices",
        "to_device",
        "train",
        "train_indices",
        "validation_indices",
        "view_anndata_setup",
    }
)
"""What users call of :class:`scvi.model.base.BaseModelClass`. The rest serves scvi-tools itself."""


def public_objects() -> dict[str, Any]:
    """Public classes, functions and constants of pertura by the name under which users import them."""
    names = [name for name in pertura.__all__ if not name.startswith("_")]
    modules = {f"pertura.{name}": importlib.import_module(f"pertura.{name}") for name in names}
    return {f"{path}.{name}": getattr(module, name) for path, module in modules.items() for name in module.__all__}


def user_members(cls: type) -> dict[str, list[str]]:
    """Members on the page of a class.

    Returns
    -------
    Names of ``methods`` and of ``attributes`` (properties), sorted: those that pertura defines, in the class or in one it
    inherits from, and those of scvi-tools that users call.
    """
    members: dict[str, list[str]] = {"methods": [], "attributes": []}
    for name in dir(cls):
        if name.startswith("_"):
            continue
        owner = next((base for base in cls.__mro__ if name in vars(base)), None)
        if owner is None:  # of the metaclass
            continue
        package = owner.__module__.partition(".")[0]
        if package != "pertura" and not (package == "scvi" and name in SCVI_MEMBERS):
            continue
        value = inspect.getattr_static(cls, name)
        if isinstance(value, property) or inspect.isdatadescriptor(value):
            if inspect.getdoc(getattr(cls, name)):  # fields of a class are described in its docstring
                members["attributes"].append(name)
        elif callable(getattr(cls, name)):
            members["methods"].append(name)
    return members


def template_context() -> dict[str, Any]:
    """What the templates of autosummary know: the members of each public class."""
    classes = {name: value for name, value in public_objects().items() if inspect.isclass(value)}
    return {"user_members": {name: user_members(cls) for name, cls in classes.items()}}


def _parse_returns(self: Any, section: str) -> list[str]:
    """Keep what stands under "Returns" as prose; napoleon takes its first line for a type."""
    lines = self._dedent(self._consume_to_next_section())
    if lines[:1] == [":"]:  # by which sphinx_autodoc_typehints keeps napoleon from looking for a type
        del lines[0]
    return [":returns:", *self._indent(lines, 4), ""]


def _parse_attributes(self: Any, section: str) -> list[str]:
    """One field for each name of a line such as ``low, high``; napoleon takes all but the last for a type."""
    lines: list[str] = []
    for name, kind, description in self._consume_fields(multiple=True):
        lines += self._format_block(f":ivar {name}: ", description)
        kind = kind or self._lookup_annotation(name)
        lines += [f":vartype {name}: {kind}"] if kind else []
    return [*lines, ""]


def _parse_property(self: Any) -> list[str]:
    """Read the docstring of a property like any other; napoleon takes what stands before a colon for a type."""
    return type(self)(self._consume_to_end(), self._config).lines()


class _PublicNames:
    """Links and bases by public names."""

    def __init__(self) -> None:
        self.objects = public_objects()
        self.classes = {value for value in self.objects.values() if inspect.isclass(value)}
        self.public = {
            f"{value.__module__}.{value.__qualname__}": name
            for name, value in self.objects.items()
            if hasattr(value, "__qualname__")
        }

    def resolve(self, app: Sphinx, env: BuildEnvironment, node: Element, contnode: Element) -> Any:
        """Link the name under which users import what a private module defines, and names relative to a page.

        Private names have no page, nor have attributes that the docstring of their class describes: they stay text.
        """
        if node.get("refdomain") != "py":
            return None
        target, source = node["reftarget"], node.get("refdoc", env.docname)
        domain = env.get_domain("py")
        for name in (self._public(target), *self._relative(target, source)):
            if name in domain.objects:
                return domain.resolve_xref(env, source, app.builder, "obj", name, node, contnode)
        own = target.startswith("pertura.") or "." not in target
        private = own and any(part.startswith("_") for part in target.split("."))
        return contnode if private or (node.get("reftype") == "attr" and "." not in target) else None

    def _public(self, target: str) -> str:
        """``pertura.model._base.Model.train`` as ``pertura.model.Model.train``."""
        owner, _, member = target.rpartition(".")
        return self.public.get(target) or f"{self.public.get(owner, owner)}.{member}"

    def _relative(self, target: str, page: str) -> list[str]:
        """What `target` may stand for in a table on a page; Sphinx does not know what its rows are about."""
        page = page.rpartition("/")[2]
        if page in self.objects:  # of a class or function
            return [f"{page}.{target}", f"{page.rpartition('.')[0]}.{target}"]
        return [name for name in self.objects if name.endswith(f".{target}")]

    def bases(self, app: Sphinx, name: str, obj: type, options: Any, bases: list[Any]) -> None:
        """Show the nearest public bases of a class."""
        bases[:] = dict.fromkeys(public for base in bases for public in self._nearest(base)) or [object]

    def _nearest(self, base: Any) -> list[Any]:
        if not (inspect.isclass(base) and base.__module__.startswith("pertura")) or base in self.classes:
            return [base]
        return [public for parent in base.__bases__ if parent is not object for public in self._nearest(parent)]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    from sphinx.ext.napoleon import NumpyDocstring

    NumpyDocstring._parse_returns_section = _parse_returns
    NumpyDocstring._parse_attributes_section = _parse_attributes
    NumpyDocstring._parse_attribute_docstring = _parse_property
    names = _PublicNames()
    app.connect("missing-reference", names.resolve)
    app.connect("autodoc-process-bases", names.bases)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
