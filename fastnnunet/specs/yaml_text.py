"""YAML as far as JSON goes."""

import typing
from typing import Any

import yaml


def parse_yaml(text: str) -> Any:
    """Mappings, lists and plain values. Raises ValueError for what else there is, RecursionError where it is deep."""
    try:
        return yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as e:
        raise ValueError(str(e)) from e


class _UniqueKeys(yaml.SafeLoader):
    """No dates, no sets or bytes, and no key twice."""

    yaml_constructors: typing.ClassVar = {
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (
            None,
            *(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")),
        )
    }

    def flatten_mapping(self, node: Any) -> None:
        """Called for every mapping, before `<<` puts in the keys of others, which its own may replace."""
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # a list or mapping, which nothing here takes as a key
            name = key.value if key.tag.endswith(":merge") else self.construct_object(key)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add(name)
        super().flatten_mapping(node)
