"""Tool calls in what a model wrote."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from episode_table import HOSTILE
from transformers import AutoTokenizer

from cohort.cluster.commands.check.environment import check_environment
from cohort.cluster.commands.check.stages import Stage
from cohort.cluster.config import Config
from cohort.rewards.environments.base import EnvironmentLoadError
from cohort.rewards.environments.calls import OWN, find_parser, reads, written_call
from cohort.rewards.tool_messages import TOOL
from tests.templates import FAMILIES, Family, tokenizer_of

MANY = " " * 100_000


@pytest.mark.parametrize("name", OWN)
def test_a_reply_of_many_spaces_is_read_at_once(name: str) -> None:
    """It is read in the event loop of the worker, which plays other episodes, too."""
    signs = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "")
    began = time.perf_counter()
    for sign in signs:
        OWN[name](f"{sign}{{{MANY}}}x")
        OWN[name](f"{sign}{MANY}x")
        OWN[name](f"{MANY}{sign}{MANY}x")
        OWN[name](f"{sign} " * 20_000)
    assert time.perf_counter() - began < 2


A, B = ("a", {"x": 1}, None), ("b", {}, None)
READ = {
    "llama3_json": {
        '{"name": "a", "parameters": {"x": 1}}': ("", [A]),
        '<|python_tag|>{"name": "a", "arguments": {"x": 1}}; {"name": "b", "parameters": {}}':
            ("", [A, B]),
        # An answer that is JSON is no call.
        '{"name": "Paris", "country": "France"}': None,
        '{"name": "Paris", "about": {"parameters": {}}}': None,
        "Sure!": None,
    },
    "mistral": {
        '[TOOL_CALLS][{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {}}]':
            ("", [A, B]),
        'So: [TOOL_CALLS] [{"name": "a", "arguments": {"x": 1}}]\n\nDone': ("So: \n\nDone", [A]),
        '[TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]b[ARGS]{}': ("", [A, B]),
        '[TOOL_CALLS]a[CALL_ID]call00001[ARGS]{"x": 1}': ("", [A]),
        '[TOOL_CALLS]a{"x": 1}': ("", [A]),
        "Sure!": None,
    },
    "hermes": {
        'So: <tool_call>\n{"name": "a", "arguments": {"x": 1}}\n</tool_call>': ("So:", [A]),
        '<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}': ("", [A]),
        "Sure!": None,
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(name, text) for name in READ for text in READ[name]])
def test_calls_are_read_in_the_forms_that_models_write(name: str, text: str) -> None:
    assert OWN[name](text) == (READ[name][text] or (text, []))


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_json_has_not_is_a_broken_call(number: str) -> None:
    """Whoever reads `rollouts/` strictly would stumble over it."""
    for name, form in {
        "hermes": '<tool_call>{"name": "a", "arguments": {"x": %s}}</tool_call>',
        "llama3_json": '{"name": "a", "parameters": {"x": %s}}',
        "mistral": '[TOOL_CALLS]a[ARGS]{"x": %s}',
    }.items():
        ((_, arguments, error),) = OWN[name](form % number)[1]
        assert arguments == {}
        assert error is not None and "not valid JSON" in error


@pytest.mark.parametrize("family", [one for one in FAMILIES if one.template], ids=lambda f: f.name)
def test_auto_reads_what_the_template_writes(family: Family) -> None:
    tokenizer = tokenizer_of(family)
    stops = [tokenizer.convert_tokens_to_ids(end) for end in family.ends]
    written = written_call(tokenizer, dict(family.arguments), stops)
    assert written is not None
    # OpenAI's harmony is read by no parser yet, and `cohort check` says so.
    assert reads(find_parser("auto", tokenizer, [TOOL]), written) is (family.name != "gpt-oss")


OF_TRL = ("qwen3_6", "qwen3_8", "gemma4", "gemma4_v5", "glm4moe", "nemotron_3_nano", "muse_glimmer")


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_TRL)
def test_auto_finds_the_parser_of_vllm_that_reads_the_template(name: str) -> None:
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    tokenizer = tokenizer_of(next(one for one in FAMILIES if one.name == "qwen3"))
    tokenizer.chat_template = (folder / f"{name}.jinja").read_text()
    written = written_call(tokenizer, {}, ())
    assert written is not None
    assert reads(find_parser("auto", tokenizer, [TOOL]), written)


TAGGED = """{% if tools %}{{ tools }}{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or () %}<tool_call>
<function={{ call.function.name }}>
{%- for name, value in call.function.arguments.items() %}
<parameter={{ name }}>
{{ value }}
</parameter>
{%- endfor %}
</function>
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.slow
def test_check_says_where_calls_of_the_template_are_not_read(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TAGGED

    def warnings(parser: str) -> list[str]:
        config = Config.model_validate(
            {
                "task": {"environment": f"{HOSTILE}:Shop"},
                "model": {"path": str(model)},
                "environments": {"tool_parser": parser},
            }
        )
        stage = Stage(lambda _: None)
        check_environment(config, str(model), tokenizer, stage)
        return [line for line in stage.warnings if "tool_parser" in line]

    assert warnings("auto") == warnings("qwen3_coder") == []
    (line,) = warnings("hermes")
    assert "environments.tool_parser=hermes does not find the calls" in line
    assert "<function=lookup>" in line
    with pytest.raises(EnvironmentLoadError, match="hermess: there is no such parser; there are"):
        warnings("hermess")
