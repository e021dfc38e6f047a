"""Stage 1: soft labels of the teacher ensemble, once for all student sizes.

make cache DATASET=4 CONFIG=3d_fullres
"""

import argparse
from pathlib import Path

from fastnnunet import api
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.load import load_yaml_spec
from fastnnunet.specs.teacher import TeacherSpec
from pipelines.common import run


def main(dataset: str, configuration: str, spec_file: Path) -> None:
    teacher = TeacherSpec(dataset=dataset, configuration=configuration)
    with api.View() as view:
        api.label(teacher, load_yaml_spec(CacheSpec, spec_file), recipe_file=spec_file, verify=True, progress=view)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("configuration")
    parser.add_argument("--spec", type=Path, default=Path("cache_specs/default.yaml"))
    args = parser.parse_args()
    run(lambda: main(args.dataset, args.configuration, args.spec))
