"""Every recipe that ships is valid, says how to build it, and differs from the others."""

from pathlib import Path

import pytest

from fastnnunet.cache.codecs import codec_for_spec, identity_of_codec
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.canonical import canonical_json
from fastnnunet.specs.load import load_yaml_spec

RECIPES = sorted((Path(__file__).parents[1] / "cache_specs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_loads_and_shows_its_command(path):
    spec = load_yaml_spec(CacheSpec, path)
    codec = codec_for_spec(spec, 3, has_regions=path.stem == "regions")
    assert 0 < codec.eps <= 1 / 15
    assert f"--spec cache_specs/{path.name}" in path.read_text()


def test_no_two_are_the_same():
    specs = [load_yaml_spec(CacheSpec, path) for path in RECIPES]
    kinds = {
        canonical_json([identity_of_codec(codec_for_spec(s, 3, has_regions=False), s.temperature), s.policy, s.mirroring])
        for s in specs
        if s.encoding != "sigmoid_u8"
    }
    assert len(kinds) == len(specs) - 1
