from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip(
        "the script reads pyproject.toml with Python 3.11's tomllib", allow_module_level=True
    )

import tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("check_lowest", ROOT / "scripts/check_lowest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def project(dependencies=(), build=(), **extras):
    return {
        "build-system": {"requires": list(build)},
        "project": {"dependencies": list(dependencies), "optional-dependencies": extras},
    }


def test_bounds_become_versions(script):
    given = project(["torch>=2.11"], ["builder>=0.11"], many=["a>=1.5,<2", "b[x]>=3", "tool==7"])
    assert script.lowest_versions(given) == ["torch==2.11", "builder==0.11", "a==1.5", "b[x]==3"]


def test_the_highest_of_several_bounds_and_all_extras(script):
    given = project(one=["a>=1.9", "b>=2"], two=["a[x]>=1.10", "b[y]>=1"])
    assert script.lowest_versions(given) == ["a[x]==1.10", "b[y]==2"]


@pytest.mark.parametrize("text", ["a", "a<3", "a!=2"])
def test_a_requirement_without_a_bound_is_refused(script, text):
    with pytest.raises(ValueError, match="a must have a lower bound, got a"):
        script.lowest_versions(project(one=[text]))


def test_every_requirement_of_this_project_has_a_bound(script):
    versions = script.lowest_versions(PROJECT)
    assert versions[0].startswith("torch==")
    assert {"numpy", "transformers", "pytest"} <= {text.split("==")[0] for text in versions}
    assert script.oldest_python(PROJECT) == "python3.10"
