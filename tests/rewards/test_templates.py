"""One table: what every family's tokenizer and chat template make of prompts and completions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cohort.actors.engine import stop_token_ids
from cohort.actors.text import completion_text
from cohort.rewards.rendering import names_read
from cohort.rewards.tasks import PromptRenderer, Row, TaskError
from tests.templates import FAMILIES, FOLDER, Family, tokenizer_of

CHAT = [family for family in FAMILIES if family.template]
QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]
PREFILLS = (
    "<think>",
    "Let me solve this step by step.\n<think>\n",
    "  The answer is ",
    "<think>\nshort\n</think>\n\nSo",
    "Half \u00e9",
)


def named(families: Any) -> Any:
    return pytest.mark.parametrize("family", families, ids=[family.name for family in families])


def text_of(family: Family, content: Any, **arguments: Any) -> str:
    renderer = PromptRenderer(tokenizer_of(family), None, arguments)
    prompt = renderer.render(Row("r", content), 0)
    assert prompt.text is not None
    return prompt.text


@named(CHAT)
def test_a_question_ends_where_the_model_begins(family: Family) -> None:
    text = text_of(family, QUESTION)
    assert text.endswith(f"What is 2 + 3?{family.opens}")
    if family.bos and family.template not in ("smollm2", "gptoss"):
        assert text.startswith(family.bos)
    if family.bos and family.template != "smollm2":
        assert text.count(family.bos) <= 1


@named(CHAT)
@pytest.mark.parametrize("prefill", PREFILLS)
def test_an_answer_that_the_prompt_begins_is_continued(family: Family, prefill: str) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": prefill}]
    assert text_of(family, messages).endswith(f"What is 2 + 3?{family.header}{prefill}")


@named(CHAT)
def test_earlier_answers_are_closed_and_the_last_is_not(family: Family) -> None:
    messages = [
        *QUESTION,
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "And 3 + 3?"},
        {"role": "assistant", "content": "I think"},
    ]
    text = text_of(family, messages)
    assert text.endswith(f"And 3 + 3?{family.header}I think")
    tokenizer = tokenizer_of(family)
    renderer = PromptRenderer(tokenizer)
    last = renderer.render(Row("r", messages), 0).token_ids[-1]
    assert tokenizer.convert_ids_to_tokens(last) not in (*family.ends, family.eos)


@named(FAMILIES)
@pytest.mark.parametrize("begins", [False, True])
def test_plain_text_begins_once_and_never_ends(family: Family, begins: bool) -> None:
    text = (family.bos or "") * begins + "2 + 3 ="
    for appends in (None, family.eos, "[SEP]"):
        tokenizer = tokenizer_of(family, appends=appends)
        ids = PromptRenderer(tokenizer).render(Row("r", text), 0).token_ids
        assert tokenizer.decode(ids).endswith("2 + 3 =")
        if family.bos:
            adds = family.template not in (None, "smollm2")
            assert tokenizer.decode(ids).count(family.bos) == (1 if adds or begins else 0)


@named(FAMILIES)
def test_completions_keep_every_special_token_but_the_end(family: Family, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(family)
    ends = [tokenizer.convert_tokens_to_ids(name) for name in family.ends]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    stops = stop_token_ids(str(tmp_path), tokenizer.eos_token_id)
    hidden = {*family.ends, family.eos, family.pad}
    kept = [name for name in (*family.others, family.bos) if name and name not in hidden]
    wrote = " , ".join(["It is", *kept, "5 ."])
    ids = tokenizer(wrote, add_special_tokens=False)["input_ids"]
    for end in ends:
        assert completion_text(tokenizer, [*ids, end], stops) == wrote
    if family.pad:
        padded = [*ids, ends[0], *[tokenizer.pad_token_id] * 3]
        assert completion_text(tokenizer, padded, stops) == wrote


@named([family for family in CHAT if family.arguments])
def test_template_arguments_reach_the_template(family: Family) -> None:
    ((name, value),) = family.arguments
    without, given = text_of(family, QUESTION), text_of(family, QUESTION, **{name: value})
    assert without != given
    begun = [*QUESTION, {"role": "assistant", "content": "So"}]
    assert text_of(family, begun) != text_of(family, begun, **{name: value})


@named(FAMILIES)
def test_an_argument_that_no_template_reads_is_refused(family: Family) -> None:
    with pytest.raises(TaskError, match=r"model\.template_arguments"):
        text_of(family, QUESTION, enable_thoughts=True)
    with pytest.raises(TaskError, match=r"model\.template_arguments"):
        text_of(family, QUESTION, add_generation_prompt=False)


def test_a_similar_argument_is_named() -> None:
    qwen3 = next(family for family in FAMILIES if family.name == "qwen3")
    with pytest.raises(TaskError, match=r"does not read it; did you mean enable_thinking\?"):
        text_of(qwen3, QUESTION, enable_thinkin=False)


def test_thinking_switched_off_stays_before_the_beginning() -> None:
    qwen3 = next(family for family in FAMILIES if family.name == "qwen3")
    begun = [*QUESTION, {"role": "assistant", "content": "So"}]
    text = text_of(qwen3, begun, enable_thinking=False)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nSo")


def test_a_template_without_a_way_to_open_an_answer() -> None:
    qwen = FAMILIES[0]
    tokenizer = tokenizer_of(qwen)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}"
    )
    for content in (QUESTION, [*QUESTION, {"role": "assistant", "content": ""}]):
        text = PromptRenderer(tokenizer).render(Row("r", content), 0).text
        assert text is not None and text.endswith(f"What is 2 + 3?{ASSISTANT_OF_QWEN}")


ASSISTANT_OF_QWEN = FAMILIES[0].opens


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'][:5] }}{% endfor %}{{ add_generation_prompt }}",
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
        "{{ add_generation_prompt }}",
    ],
)
def test_a_template_that_does_not_print_the_beginning(template: str) -> None:
    tokenizer = tokenizer_of(FAMILIES[0])
    tokenizer.chat_template = template
    begun = [*QUESTION, {"role": "assistant", "content": "So it is"}]
    with pytest.raises(TaskError, match=r"row r .*does not print them as they are"):
        PromptRenderer(tokenizer).render(Row("r", begun), 0)


def test_half_a_surrogate_names_the_row() -> None:
    renderer = PromptRenderer(tokenizer_of(FAMILIES[0]))
    with pytest.raises(TaskError, match=r"row r7 .*cannot read the prompt"):
        renderer.render(Row("r7", "a \ud83d b"), 0)
    with pytest.raises(TaskError, match=r"row r7 "):
        renderer.render(Row("r7", [{"role": "user", "content": "a \ud83d b"}]), 0)


def test_names_that_a_template_reads() -> None:
    template = (
        "{% set a = b %}{% for m in messages %}{% generation %}{{ m.content + suffix }}"
        "{% endgeneration %}{% if loop.first %}{% continue %}{% endif %}{% endfor %}{{ a }}"
    )
    assert names_read(template) == {"b", "messages", "suffix"}
    assert names_read("{% if %}") == set()


def test_every_template_is_in_the_table() -> None:
    files = {file.stem for file in FOLDER.glob("*.jinja")}
    assert files == {family.template for family in CHAT}
