"""Checks manifests against the schemas of custom resources, strictly: a key that a schema does not know is refused.

A cluster drops such keys without a word. The schemas are those that a cluster has, ``kubectl get crd -o yaml``. Their rules in
CEL are not evaluated.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from shardwright.launch.kubernetes.checks import meant

_OPEN = "x-kubernetes-preserve-unknown-fields"


class Schema:
    """A schema of a kind, which allows no keys that it does not know.

    Args:
        schema: as OpenAPI 3.
    """

    def __init__(self, schema: Mapping[str, Any]):
        self._schema = schema

    @cached_property
    def _validator(self) -> Any:
        return _json_schema()(_strict(self._schema, True))

    def check(self, manifest: Any) -> list[str]:
        """Lists what the schema does not allow in a manifest.

        Args:
            manifest: the manifest.
        """
        found = sorted(self._validator.iter_errors(manifest), key=lambda error: [str(part) for part in error.absolute_path])
        return [_line(error) for error in found]


def read_schemas(folder: str | Path) -> dict[tuple[str, str], Schema]:
    """Reads the custom resource definitions of a folder.

    Args:
        folder: with files ending in .yaml.

    Returns:
        The schema of each kind, by ``(apiVersion, kind)``.
    """
    found = {}
    for path in sorted(Path(folder).glob("*.yaml")):
        for content in _yaml().load_all(path.read_text("utf-8"), getattr(_yaml(), "CSafeLoader", _yaml().SafeLoader)):
            if isinstance(content, Mapping) and content.get("kind") == "CustomResourceDefinition":
                spec = content["spec"]
                for version in spec["versions"]:
                    key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                    found[key] = Schema(version["schema"]["openAPIV3Schema"])
    return found


def read_manifests(path: str | Path) -> list[Any]:
    """Reads the manifests of a YAML file.

    Args:
        path: the file; ``-`` is the standard input.

    Raises:
        ValueError: the file is no YAML.
    """
    text = sys.stdin.read() if str(path) == "-" else Path(path).read_text("utf-8")
    try:
        return [content for content in _yaml().safe_load_all(text) if content is not None]
    except _yaml().YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None


def to_yaml(manifests: Sequence[Any]) -> str:
    """Returns manifests as YAML.

    Args:
        manifests: the manifests.
    """
    text: str = _yaml().safe_dump_all(manifests, sort_keys=False, width=120)
    return text


def _strict(schema: Any, is_top: bool = False) -> Any:
    """Returns a schema that allows no other keys, as JSON schema."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {
        key: _strict(value) for key, value in schema.items() if key not in ("properties", "description", "default", "format")
    }
    if "properties" in schema:
        own = {key: _strict(value) for key, value in schema["properties"].items()}
        if is_top:
            own["metadata"] = _METADATA
        found["properties"] = own
        if not schema.get(_OPEN) and "additionalProperties" not in schema:
            found["additionalProperties"] = False
    return found


_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = {
    "type": "object",
    "properties": {
        **{key: {"type": "string"} for key in ("name", "namespace", "generateName")},
        "labels": _LABELS,
        "annotations": _LABELS,
    },
    "additionalProperties": False,
}


def _line(error: Any) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path).lstrip(".")
    if error.validator == "additionalProperties":
        known = list(error.schema.get("properties", ()))
        unknown = [key for key in error.instance if key not in known]
        return "; ".join(f"{place}.{key}".lstrip(".") + f": there is no such key; {meant(str(key), known)}" for key in unknown)
    return f"{place or 'the manifest'}: {error.message}"


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("manifests need PyYAML: pip install 'shardwright[kubernetes]'") from error
    return yaml


def _json_schema() -> Any:
    try:
        from jsonschema import Draft202012Validator
    except ImportError as error:
        raise ImportError("schemas need jsonschema: pip install 'shardwright[kubernetes]'") from error
    return Draft202012Validator


def check_core(manifest: Any) -> list[str] | None:
    """Lists what Kubernetes' own schemas do not allow in a manifest of a core kind; ``None`` where nothing can check it.

    Args:
        manifest: of a kind such as Job or Service.
    """
    try:
        import kubernetes_validate
    except ImportError:
        return None
    try:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        place = ".".join(str(part) for part in error.path)
        return [f"{place}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError:
        return None
    return []
