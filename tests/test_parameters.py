"""`--name=value` overrides of the parameters at the top of a script."""

import pytest

from utils import override_parameters, script_parameters


def make_namespace():
    """What `globals()` of a script may hold."""
    return {
        "__doc__": "A script.", "lr": 1e-3, "iterations": 100, "bf16": True, "folder": "data", "decay_at": (80, 90),
        "names": (), "MEAN": (1, 2), "_private": 1, "main": make_namespace, "pytest": pytest,
    }  # fmt: skip


def test_parameters_are_the_lowercase_plain_values():
    assert set(script_parameters(make_namespace())) == {"lr", "iterations", "bf16", "folder", "decay_at", "names"}


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("--lr=2e-4", "lr", 2e-4),
        ("--lr=1", "lr", 1.0),
        ("--iterations=1_000", "iterations", 1000),
        ("--bf16=False", "bf16", False),
        ("--folder=a=b c", "folder", "a=b c"),
        ("--folder=", "folder", ""),
        ("--decay_at=(60, 80)", "decay_at", (60, 80)),
        ("--decay_at=60", "decay_at", (60,)),
        ("--decay_at=()", "decay_at", ()),
        ('--names=("cat", "dog")', "names", ("cat", "dog")),
        ("--names=cat, traffic light", "names", ("cat", "traffic light")),
        ("--names=cat", "names", ("cat",)),
        ("--names=", "names", ()),
    ],
)
def test_override(argument, name, value):
    namespace = make_namespace()
    override_parameters(namespace, [argument])
    assert namespace[name] == value and type(namespace[name]) is type(value)
    assert {key: namespace[key] for key in namespace if key != name} == {
        key: entry for key, entry in make_namespace().items() if key != name
    }


@pytest.mark.parametrize(
    "argument",
    ["--lrate=1", "--MEAN=(1,)", "--_private=2", "--main=1", "lr=1", "--lr", "-lr=1", "--lr=fast", "--iterations=1.5",
     "--bf16=yes", "--decay_at=(1, x)", "--decay_at=(1.5,)"],
)  # fmt: skip
def test_bad_arguments_list_the_valid_names(argument):
    namespace = make_namespace()
    with pytest.raises(SystemExit) as error:
        override_parameters(namespace, [argument])
    assert "--decay_at=(80, 90)" in str(error.value) and argument.split("=")[-1] in str(error.value)
    assert namespace == make_namespace()


def test_help_prints_the_parameters(capsys):
    with pytest.raises(SystemExit) as error:
        override_parameters(make_namespace(), ["--help"])
    assert error.value.code == 0
    output = capsys.readouterr().out
    assert "A script." in output and "--lr=0.001" in output
