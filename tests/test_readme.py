"""The two READMEs: what they point at is there."""
import re

import pytest

import sample_diffusion
import train_diffusion
from conftest import ROOT

READMES = ["README.md", "README.zh-CN.md"]
AT_MOST = {"README.md": 12_300, "README.zh-CN.md": 12_300, "diffusion_results/README.md": 14_400}  # bytes


@pytest.mark.parametrize("name", AT_MOST)
def test_a_page_is_short_enough_to_be_read(name):
    assert (ROOT / name).stat().st_size <= AT_MOST[name]


@pytest.mark.parametrize("name", READMES)
def test_links_into_the_code_name_what_is_defined_there(name):
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", (ROOT / name).read_text())
    assert len(links) > 20
    for text, file in links:
        assert re.search(rf"^\s*(def|class) {text}\b|^{text}\s*=", (ROOT / file).read_text(), re.M), f"{file}: {text}"


@pytest.mark.parametrize("name", READMES)
def test_every_flag_that_is_named_is_there(name, capsys):
    there = set()
    for script in (train_diffusion, sample_diffusion):
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        there |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    named = set(re.findall(r"--[a-z][a-z-]*", (ROOT / name).read_text()))
    assert len(named) > 10 and named <= there, named - there


def test_no_figure_is_left_open():
    for name in [*READMES, "diffusion_results/README.md"]:
        assert not re.search(r"\{\{|@[A-Z0-9_]+@", (ROOT / name).read_text()), name


@pytest.mark.parametrize("name", READMES)
def test_files_that_are_linked_or_shown_are_there(name):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", (ROOT / name).read_text()):
        assert (ROOT / target).is_file(), f"{name}: {target}"


def test_both_say_the_same():
    """Commands, pictures, links into the code, formulas, how deep each heading is."""
    def parts(name):
        text = (ROOT / name).read_text()
        commands = [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("    ")]
        return (commands, re.findall(r"!\[[^]]*\]\(([^)]+)\)", text), re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", text),
                re.findall(r"\$\$.*\$\$", text), re.findall(r"^#+ ", text, re.M))
    english, chinese = map(parts, READMES)
    assert all(english) and english == chinese


@pytest.mark.parametrize("name", READMES)
def test_links_within_a_page_lead_to_a_heading(name):
    text = (ROOT / name).read_text()
    headings = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")  # as GitHub names them
                for heading in re.findall(r"^#+ (.*)", text, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_the_test_command_is_the_one_that_ci_runs():
    command = "requirements.txt pytest hypothesis diffusers && python -m pytest"
    assert all(command in (ROOT / name).read_text() for name in [*READMES, ".ci/run"])
