"""What follows a sampled reply: the family's own tokens, proven the template's, or reported."""

from __future__ import annotations

import doctest
import json
import random
from typing import Any

import pytest

from cohort.actors.engine import stop_token_ids
from cohort.rewards import continuation as continuation_module
from cohort.rewards import prefix_proof, tool_messages
from cohort.rewards.continuation import Continuation, Extension
from cohort.rewards.prefix_proof import prove
from cohort.rewards.rendering import RenderError
from cohort.rewards.tool_messages import (
    QUESTION,
    TOOL,
    a_call,
    a_result,
    supports_tools,
    tools_as_text,
)
from tests.templates import FAMILIES, Family, tokenizer_of

CHAT = [family for family in FAMILIES if family.template]
BY_NAME = {family.name: family for family in FAMILIES}
USER = {"role": "user", "content": "Go on."}
CALL = {"role": "assistant", "content": "", "tool_calls": [a_call(TOOL, 1, {"name": "x"})]}
NATIVE = {"qwen2.5", "qwen3", "llama3.1", "mistral v3", "gpt-oss"}
CASES = (
    "a plain reply",
    "an empty reply",
    "a truncated reply",
    "a reply with thinking",
    "a tool call",
    "a tool call with thinking",
    "two tool results",
    "a user's message after a tool result",
)
# In the order of CASES; x: exact, -: the template rewrites what came before.
PROOFS = {
    "qwen2.5": "xxxxxxxx",
    # Drops thinking when the user has spoken.
    "qwen3": "xxx-xxxx",
    "llama3": "xxxxxxxx",
    "llama3.1": "xxxxxxxx",
    "gemma3": "xxxxxxxx",
    # Writes a space before every answer.
    "mistral v1": "xxx-x-xx",
    # Moves the tools to the last question.
    "mistral v3": "----xxx-",
    "mistral v7": "xxxxxxxx",
    "deepseek v3": "xxx-x-xx",
    "deepseek r1": "xxx-x-xx",
    # <|return|> becomes <|end|>, analysis is dropped.
    "gpt-oss": "--x-xxxx",
    "smollm2": "xxxxxxxx",
}


def named(families: Any) -> Any:
    return pytest.mark.parametrize("family", families, ids=[family.name for family in families])


def stops_of(family: Family, tokenizer: Any) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(name) for name in family.ends]


def made(family: Family, **options: Any) -> tuple[Any, Continuation]:
    tokenizer = tokenizer_of(family)
    return tokenizer, Continuation(tokenizer, stop_ids=stops_of(family, tokenizer), **options)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def rendered(tokenizer: Any, turns: Continuation, messages: Any, tools: Any = None) -> str:
    """By the template alone, without the code under test, except for tools in words."""
    given = {"tools": tools} if tools and turns.native_tools else {}
    shown = list(messages) if turns.native_tools else tools_as_text(messages, tools or ())
    return str(
        tokenizer.apply_chat_template(shown, add_generation_prompt=True, tokenize=False, **given)
    )


@named(CHAT)
def test_the_table(family: Family) -> None:
    tokenizer = tokenizer_of(family)
    lines = prove(tokenizer, stop_ids=stops_of(family, tokenizer))
    assert tuple(line.case for line in lines) == CASES
    marks = {"exact": "x", "rewritten": "-", "refused": "R"}
    assert "".join(marks[line.result] for line in lines) == PROOFS[family.name]
    for line in lines:
        assert (line.why is None) == (line.result == "exact")
        assert line.why is None or "the template '" in line.why


def test_a_case_that_the_template_refuses() -> None:
    tokenizer = tokenizer_of(BY_NAME["qwen2.5"])
    tokenizer.chat_template += (
        "{% if messages | selectattr('role', 'equalto', 'tool') | list | length > 1 %}"
        "{{ raise_exception('one result at a time') }}{% endif %}"
    )
    refused = [line for line in prove(tokenizer) if line.result != "exact"]
    assert [(line.case, line.result) for line in refused] == [("two tool results", "refused")]
    assert "one result at a time" in str(refused[0].why)


def test_thinking_switched_off_is_dropped_from_earlier_turns() -> None:
    lines = prove(tokenizer_of(BY_NAME["qwen3"]), None, {"enable_thinking": False})
    assert {line.result for line in lines} == {"rewritten"}
    assert "has '<think>" in str(lines[0].why)


@named(CHAT)
def test_which_templates_know_tools(family: Family) -> None:
    tokenizer, turns = made(family, tools=[TOOL])
    assert supports_tools(tokenizer) == turns.native_tools == (family.name in NATIVE)
    text = tokenizer.decode(
        turns.prompt_ids([{"role": "system", "content": "Be brief."}, QUESTION])
    )
    assert "Looks up what a name stands for" in text
    # Mistral's v3 writes it only behind the last question.
    assert text.count("Be brief.") == 1
    assert "lookup" not in tokenizer.decode(made(family)[1].prompt_ids([QUESTION]))


def test_a_model_without_a_template() -> None:
    with pytest.raises(RenderError, match=r"has no chat template.* a task of one turn"):
        Continuation(tokenizer_of(BY_NAME["gpt2"]))


def test_an_argument_that_the_template_does_not_read() -> None:
    with pytest.raises(RenderError, match=r"model\.template_arguments\.enable_thinkin: .*did you"):
        made(BY_NAME["qwen3"], template_arguments={"enable_thinkin": False})


WORDS = ("5", " So ", "\n", "é", "", "   ", "\n\nIt is", "<think>\na\n</think>\n\n", "{}", "日")


def random_turns(seed: int) -> Any:
    pick = random.Random(seed)
    for _ in range(pick.randint(1, 4)):
        words = "".join(pick.choices(WORDS, k=pick.randint(0, 4)))
        tool = pick.random() < 0.4
        new = [a_result(TOOL, n + 1, pick.choice(WORDS)) for n in range(pick.randint(1, 2) * tool)]
        if not tool or pick.random() < 0.3:
            new.append({"role": "user", "content": pick.choice(WORDS) + "?"})
        yield words, pick.random() < 0.8, new


@named(CHAT)
@pytest.mark.parametrize("history", ["append", "template"])
def test_any_conversation_is_exact_or_says_where_it_is_not(family: Family, history: Any) -> None:
    tokenizer, turns = made(family, tools=[TOOL], history=history)
    end = tokenizer.convert_tokens_to_ids(family.ends[-1])
    seen = {"exact": 0, "fork": 0, "append": 0, "refused": 0}
    for seed in range(25):
        messages: Any = [QUESTION]
        prompt = turns.prompt_ids(messages)
        for words, ended, new in random_turns(seed):
            sampled = ids_of(tokenizer, words) + [end] * ended
            try:
                extension = turns.extend(messages, prompt, sampled, new)
            except RenderError as error:
                # They want a call, parsed, before a tool's result; Mistral's when it counts turns.
                assert family.name in ("gpt-oss", "mistral v3")
                assert f"task.history={history} " in str(error)
                seen["refused"] += 1
                break
            old = [*prompt, *sampled]
            prompt, messages = extension.sequence(prompt, sampled), extension.messages
            text = rendered(tokenizer, turns, messages, [TOOL])
            assert messages[-len(new) :] == tuple(new)
            if extension.fork:
                assert history == "template" and prompt == ids_of(tokenizer, text)
                assert old[: extension.kept] == prompt[: extension.kept]
                assert old[extension.kept] != prompt[extension.kept]
                seen["fork"] += 1
                continue
            assert prompt[: len(old)] == old and extension.kept == len(old)
            assert (tokenizer.decode(prompt) == text) == extension.exact
            assert extension.exact or history == "append"
            seen["exact" if extension.exact else "append"] += 1
    assert seen["fork" if history == "append" else "append"] == 0
    assert family.name == "gpt-oss" or seen["exact"] > 0


def merging(family: Family, first: str, second: str) -> Any:
    """The family's tokenizer, with a token for two letters that belong together."""
    from tokenizers import Tokenizer

    tokenizer = tokenizer_of(family)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"][first + second] = 1 + max(tokenizer.get_vocab().values())
    state["model"]["merges"] = [[first, second]]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


@pytest.mark.parametrize("history", ["append", "template"])
def test_ids_that_are_not_those_of_their_text_stay(history: Any) -> None:
    tokenizer = merging(BY_NAME["qwen2.5"], "h", "e")
    turns = Continuation(tokenizer, history=history)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    sampled = [*ids_of(tokenizer, "h"), *ids_of(tokenizer, "e"), end]
    assert ids_of(tokenizer, tokenizer.decode(sampled)) != sampled
    messages: Any = [QUESTION]
    prompt = turns.prompt_ids(messages)
    start = len(prompt)
    for _ in range(2):
        extension = turns.extend(messages, prompt, sampled, [{"role": "user", "content": "he"}])
        assert extension.exact and not extension.fork
        prompt, messages = extension.sequence(prompt, sampled), extension.messages
    assert prompt[start : start + 3] == sampled
    assert prompt != turns.prompt_ids(messages)
    assert tokenizer.decode(prompt) == rendered(tokenizer, turns, messages)


def with_a_space_in_front(family: Family) -> Any:
    """The family's tokenizer as a SentencePiece one: " " in front of a text, and not its tokens."""
    from tokenizers import decoders, pre_tokenizers

    tokenizer = tokenizer_of(family)
    inner = tokenizer.backend_tokenizer
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    space = pre_tokenizers.Metaspace("\u0120", prepend_scheme="first", split=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([byte_level, space])
    inner.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer


@pytest.mark.parametrize("name", ["mistral v1", "llama3"])
def test_a_tokenizer_that_puts_a_space_in_front(name: str) -> None:
    family = BY_NAME[name]
    tokenizer = with_a_space_in_front(family)
    assert tokenizer.decode(ids_of(tokenizer, "5")) == "5"
    assert len(ids_of(tokenizer, "5")) == 2
    lines = prove(tokenizer, None, None, stops_of(family, tokenizer))
    assert "".join("x-"[line.why is not None] for line in lines) == PROOFS[name]


def test_a_space_that_such_a_tokenizer_drops() -> None:
    tokenizer = with_a_space_in_front(BY_NAME["qwen2.5"])
    turns = Continuation(tokenizer)
    prompt, sampled = turns.prompt_ids([QUESTION]), ids_of(tokenizer, "5")
    assert tokenizer.decode([*prompt, *sampled]).endswith("assistant\n 5")
    extension = turns.extend([QUESTION], prompt, sampled, [USER])
    assert extension.exact and extension.messages[1]["content"] == " 5"


@pytest.mark.parametrize(
    ("name", "sampled", "appended"),
    [
        ("qwen2.5", "5<|im_end|>", "\n<|im_start|>user\n"),
        ("qwen2.5", "5", "<|im_end|>\n<|im_start|>user\n"),
        ("qwen2.5", "", "<|im_end|>\n<|im_start|>user\n"),
        ("qwen2.5", "5<|im_end|>\n", "<|im_end|>\n<|im_start|>user\n"),
        # Another end than the template's stands for it.
        ("qwen2.5", "5<|endoftext|>", "\n<|im_start|>user\n"),
        ("llama3", "5<|end_of_text|>", "<|start_header_id|>user"),
        ("llama3", "5<|eot_id|>", "<|start_header_id|>user"),
        ("gemma3", "5<end_of_turn>", "\n<start_of_turn>user"),
        ("gemma3", "5<eos>", "\n<start_of_turn>user"),
        ("gemma3", "5", "<end_of_turn>\n<start_of_turn>user"),
        ("mistral v7", "5", "</s>[INST]"),
        ("mistral v7", "5</s>", "[INST]"),
        ("deepseek r1", "a</think>5", "<｜end▁of▁sentence｜><｜User｜>"),
        ("gpt-oss", "<|channel|>final<|message|>5<|return|>", "<|start|>user<|message|>"),
        ("gpt-oss", "<|channel|>analysis<|message|>5", "<|end|><|start|>user<|message|>"),
    ],
)
def test_a_turn_ends_once(name: str, sampled: str, appended: str) -> None:
    tokenizer, turns = made(BY_NAME[name])
    reply = {"role": "assistant", "content": "5"} if name == "gpt-oss" else None
    prompt = turns.prompt_ids([QUESTION])
    ids = ids_of(tokenizer, sampled)
    extension = turns.extend([QUESTION], prompt, ids, [USER], reply)
    assert tokenizer.decode(extension.token_ids).startswith(appended)
    assert extension.sequence(prompt, ids)[: len(prompt) + len(ids)] == [*prompt, *ids]
    assert turns.prompt_ids(extension.messages)


def test_the_end_is_the_template_s_where_the_tokenizer_names_another() -> None:
    tokenizer = tokenizer_of(BY_NAME["qwen2.5"])
    tokenizer.eos_token = "<|endoftext|>"
    turns = Continuation(tokenizer)
    sampled = ids_of(tokenizer, "5<|im_end|>")
    extension = turns.extend([QUESTION], turns.prompt_ids([QUESTION]), sampled, [USER])
    assert extension.exact and extension.messages[1]["content"] == "5"


def test_a_space_that_the_template_writes_itself() -> None:
    tokenizer, turns = made(BY_NAME["mistral v1"])
    prompt = turns.prompt_ids([QUESTION])
    for sampled, content in ((" 5</s>", "5"), ("5</s>", None)):
        extension = turns.extend([QUESTION], prompt, ids_of(tokenizer, sampled), [USER])
        assert extension.exact == (content is not None)
        assert content is None or extension.messages[1]["content"] == content
    why = prove(tokenizer)[CASES.index("a reply with thinking")].why
    assert "the sequence has '<think>" in str(why) and "the template ' <think>" in str(why)


def test_half_a_character_stays() -> None:
    tokenizer, turns = made(BY_NAME["qwen2.5"])
    sampled = ids_of(tokenizer, "日")[:2]
    extension = turns.extend([QUESTION], turns.prompt_ids([QUESTION]), sampled, [USER])
    assert extension.exact and extension.messages[1]["content"] == "\ufffd"


def test_thinking_that_the_prompt_opened_forks_or_stays() -> None:
    for name in ("deepseek v3", "deepseek r1"):
        tokenizer, forks = made(BY_NAME[name], history="template")
        prompt = forks.prompt_ids([QUESTION])
        sampled = ids_of(tokenizer, "I add.\n</think>5<｜end▁of▁sentence｜>")
        fork = forks.extend([QUESTION], prompt, sampled, [USER])
        assert fork.fork and not fork.exact and "<think>" in str(fork.why)
        text = tokenizer.decode(fork.sequence(prompt, sampled))
        assert text.startswith(
            "<｜begin▁of▁sentence｜><｜User｜>What is 2 + 3?<｜Assistant｜>5<｜end"
        )
        assert fork.kept == len(prompt) - len(ids_of(tokenizer, "<think>\n"))
        keeps = made(BY_NAME[name])[1].extend([QUESTION], prompt, sampled, [USER])
        assert not keeps.fork and "I add." in str(keeps.why)
        assert keeps.sequence(prompt, sampled)[: len(prompt) + len(sampled)] == [*prompt, *sampled]


def test_qwen3_keeps_thinking_while_tools_answer() -> None:
    tokenizer, turns = made(BY_NAME["qwen3"], tools=[TOOL], history="template")
    thinks = "<think>\nI look.\n</think>\n\n"
    call = '<tool_call>\n{"name": "lookup", "arguments": {"name": "x"}}\n</tool_call><|im_end|>'
    prompt, messages = turns.prompt_ids([QUESTION]), [QUESTION]
    sampled = ids_of(tokenizer, thinks + call)
    extension = turns.extend(messages, prompt, sampled, [a_result(TOOL, 1, "3")])
    assert extension.exact
    prompt = extension.sequence(prompt, sampled)
    sampled = ids_of(tokenizer, thinks + "It is 3.<|im_end|>")
    fork = turns.extend(extension.messages, prompt, sampled, [USER])
    assert fork.fork and "I look." in str(fork.why)
    assert "I look." not in tokenizer.decode(fork.sequence(prompt, sampled))


def test_an_answer_that_the_prompt_begins() -> None:
    for family in CHAT:
        tokenizer, turns = made(family)
        begun = [QUESTION, {"role": "assistant", "content": "It is"}]
        prompt = turns.prompt_ids(begun)
        sampled = ids_of(tokenizer, " five")
        extension = turns.extend(begun, prompt, sampled, [USER])
        assert extension.exact, family.name
        assert extension.messages[1]["content"] == "It is five"


def test_gpt_oss_needs_the_call_that_a_result_answers() -> None:
    tokenizer, turns = made(BY_NAME["gpt-oss"], tools=[TOOL])
    prompt = turns.prompt_ids([QUESTION])
    # As the model writes it, and the template does not.
    written = (
        "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.lookup json<|message|>{"name": "x"}<|call|>'
    )
    sampled, result = ids_of(tokenizer, written), a_result(TOOL, 1, "3")
    reply = {**CALL, "thinking": "I look."}
    extension = turns.extend([QUESTION], prompt, sampled, [result], reply)
    assert not extension.exact and "commentary to=functions.lo" in str(extension.why)
    assert tokenizer.decode(extension.token_ids) == (
        '<|start|>functions.lookup to=assistant<|channel|>commentary<|message|>"3"<|end|>'
        "<|start|>assistant"
    )
    cut = turns.extend([QUESTION], prompt, sampled[:-1], [result], reply)
    assert tokenizer.decode(cut.token_ids).startswith("<|call|><|start|>functions.lookup")
    with pytest.raises(
        RenderError, match=r"task\.history=append cannot put .*\(tool\).*no previous"
    ):
        turns.extend([QUESTION], prompt, sampled, [result])


def test_mistral_counts_turns_without_calls() -> None:
    tokenizer, turns = made(BY_NAME["mistral v3"], tools=[TOOL])
    prompt = turns.prompt_ids([QUESTION])
    called = ids_of(
        tokenizer,
        '[TOOL_CALLS][{"name": "lookup", "arguments": {"name": "x"}, "id": "call00001"}]</s>',
    )
    first = turns.extend([QUESTION], prompt, called, [a_result(TOOL, 1, "3")], CALL)
    assert first.exact and first.messages[1] == CALL
    prompt = first.sequence(prompt, called)
    sampled = ids_of(tokenizer, "It is 3.</s>")
    second = turns.extend(first.messages, prompt, sampled, [USER])
    assert "AVAILABLE_TOOLS" in str(second.why)
    # What its template moves is there twice.
    assert tokenizer.decode(second.token_ids).startswith("[AVAILABLE_TOOLS]")


def test_words_that_were_not_sampled_are_not_appended() -> None:
    for history in ("append", "template"):
        tokenizer, turns = made(BY_NAME["qwen2.5"], history=history)
        prompt, cut = turns.prompt_ids([QUESTION]), ids_of(tokenizer, "It is")
        reply = {"role": "assistant", "content": "It is five"}
        extension = turns.extend([QUESTION], prompt, cut, [USER], reply)
        assert extension.exact and extension.messages[1]["content"] == "It is"
        assert "five" not in tokenizer.decode(extension.token_ids)


def test_what_a_template_refuses_names_the_key() -> None:
    tokenizer, turns = made(BY_NAME["gemma3"])
    prompt, sampled = turns.prompt_ids([QUESTION]), ids_of(tokenizer, "5<end_of_turn>")
    with pytest.raises(
        RenderError, match=r"task\.history=append cannot .*\(user, user\).*must alternate[^;]*$"
    ):
        turns.extend([QUESTION], prompt, sampled, [USER, USER])
    with pytest.raises(ValueError, match="no new messages"):
        turns.extend([QUESTION], prompt, sampled, [])


def test_a_refusal_names_the_value_that_works() -> None:
    tokenizer, turns = made(BY_NAME["gpt-oss"], history="template")
    prompt = turns.prompt_ids([QUESTION])
    sampled = ids_of(tokenizer, "<|channel|>final<|message|>5<|return|>")
    with pytest.raises(RenderError, match=r"history=template cannot .*; task\.history=append can"):
        turns.extend([QUESTION], prompt, sampled, [USER])
    tokenizer, _ = made(BY_NAME["qwen2.5"])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content | upper if m.role == 'assistant' and "
        "messages | length > 3 else m.content }}<|im_end|>{% endfor %}{{ add_generation_prompt }}"
    )
    before = [QUESTION, USER]
    turns = Continuation(tokenizer)
    with pytest.raises(RenderError, match=r"history=append cannot .*; task\.history=template can"):
        turns.extend(before, turns.prompt_ids(before), ids_of(tokenizer, "five"), [USER])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(RenderError, match="does not print the assistant's words"):
        Continuation(tokenizer)


def test_a_model_that_stops_at_the_next_role() -> None:
    """GLM's templates have no end of a turn: the model stops at the token of the next role."""
    tokenizer = merging(BY_NAME["llama3"], "h", "e")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|start_header_id|>' if m.role == 'user' else "
        "'<|end_header_id|>' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|end_header_id|>{% endif %}"
    )
    next_role = tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    turns = Continuation(tokenizer, stop_ids=[next_role])
    prompt = turns.prompt_ids([QUESTION])
    for written, appended, exact in (
        ("5<|start_header_id|>", "Go on.<|end_header_id|>", True),
        ("5", "<|start_header_id|>Go on.<|end_header_id|>", True),
        ("5<|eot_id|>", "<|start_header_id|>Go on.<|end_header_id|>", False),
    ):
        extension = turns.extend([QUESTION], prompt, ids_of(tokenizer, written), [USER])
        assert (tokenizer.decode(extension.token_ids), extension.exact) == (appended, exact)
    # Not the ids of its text: the next role's token is not there twice either.
    sampled = [*ids_of(tokenizer, "h"), *ids_of(tokenizer, "e"), next_role]
    extension = turns.extend([QUESTION], prompt, sampled, [USER])
    assert (tokenizer.decode(extension.token_ids), extension.exact) == (
        "Go on.<|end_header_id|>",
        True,
    )
    assert turns.example([QUESTION], USER)[-1] == tokenizer.eos_token_id


def test_tools_in_words() -> None:
    tokenizer, turns = made(BY_NAME["gemma3"], tools=[TOOL])
    prompt = turns.prompt_ids([QUESTION])
    call = '<tool_call>\n{"name": "lookup", "arguments": {"name": "x"}}\n</tool_call>'
    sampled = ids_of(tokenizer, f"{call}<end_of_turn>")
    new = [a_result(TOOL, 1, "3"), a_result(TOOL, 2, "5"), USER]
    extension = turns.extend([QUESTION], prompt, sampled, new, CALL)
    assert extension.exact
    assert tokenizer.decode(extension.token_ids) == (
        "\n<start_of_turn>user\n<tool_response>\n3\n</tool_response>\n"
        "<tool_response>\n5\n</tool_response>\n\nGo on.<end_of_turn>\n<start_of_turn>model\n"
    )
    # Parsed calls of earlier turns read as the model wrote them.
    assert tools_as_text([QUESTION, CALL])[1] == {"role": "assistant", "content": call}
    both = tools_as_text([{**CALL, "content": "Look:", "thinking": "So."}])[0]
    assert both == {"role": "assistant", "content": f"Look:\n{call}", "thinking": "So."}


def test_tools_in_words_without_a_system_message() -> None:
    """Gemma 2's template refuses one."""
    tokenizer = tokenizer_of(BY_NAME["gemma3"])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{%- if messages[0]['role'] == 'system' -%}",
        "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('System role') }}",
    )
    turns = Continuation(tokenizer, [TOOL], stop_ids=stops_of(BY_NAME["gemma3"], tokenizer))
    prompt = turns.prompt_ids([QUESTION])
    text = tokenizer.decode(prompt)
    assert text.startswith("<bos><start_of_turn>user\n# Tools\n\n")
    assert text.endswith("\n\nWhat is 2 + 3?<end_of_turn>\n<start_of_turn>model\n")
    sampled = ids_of(tokenizer, "5<end_of_turn>")
    assert turns.extend([QUESTION], prompt, sampled, [USER]).exact
    without = {"role": "assistant", "tool_calls": CALL["tool_calls"]}
    assert tools_as_text([QUESTION, without]) == tools_as_text([QUESTION, CALL])


def test_several_templates_by_name() -> None:
    tokenizer = tokenizer_of(BY_NAME["qwen2.5"])
    plain = tokenizer_of(BY_NAME["smollm2"]).chat_template
    tokenizer.chat_template = {"default": plain, "tool_use": tokenizer.chat_template}
    assert supports_tools(tokenizer)
    turns = Continuation(tokenizer, [TOOL])
    assert "<tools>" in tokenizer.decode(turns.prompt_ids([QUESTION]))
    assert "SmolLM" in tokenizer.decode(Continuation(tokenizer).prompt_ids([QUESTION]))


def test_a_template_that_wants_arguments_as_text() -> None:
    tokenizer = tokenizer_of(BY_NAME["qwen2.5"])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "tool_call.arguments | tojson", "'' + tool_call.arguments"
    )
    assert supports_tools(tokenizer)


def test_an_extension_adds_up() -> None:
    appended = Extension((7, 8), 3, (), None, False)
    assert appended.exact and appended.sequence([1, 2], [3]) == [1, 2, 3, 7, 8]
    fork = Extension((7, 8), 1, (), "because", True)
    assert not fork.exact and fork.sequence((1, 2), (3,)) == [1, 7, 8]


def test_stop_ids_are_those_of_the_engine(tmp_path: Any) -> None:
    """gpt-oss ends calls with a token that only the model's generation config names."""
    family = BY_NAME["gpt-oss"]
    tokenizer = tokenizer_of(family)
    ends = stops_of(family, tokenizer)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    stops = stop_token_ids(str(tmp_path), tokenizer.eos_token_id)
    written = Continuation(tokenizer, [TOOL], stop_ids=stops).example([QUESTION], CALL)
    assert tokenizer.decode(written).endswith('{"name": "x"}<|call|>')


@pytest.mark.parametrize("module", [continuation_module, tool_messages, prefix_proof])
def test_the_examples_of_the_docstrings(module: Any) -> None:
    given = {"tokenizer": tokenizer_of(BY_NAME["qwen2.5"])}
    found = doctest.testmod(module, extraglobs=given)
    assert found.failed == 0 and found.attempted > 0


def sampled_by(family: Family, tokenizer: Any, text: str) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False)["input_ids"],
            tokenizer.convert_tokens_to_ids(family.ends[0])]  # fmt: skip


@pytest.mark.parametrize("family", CHAT, ids=lambda family: family.name)
@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_a_new_message_is_behind_the_reply_or_refused(family: Family, role: str) -> None:
    """DeepSeek's template moves system messages to the front. And words of ours are words."""
    tokenizer = tokenizer_of(family)
    stops = [tokenizer.convert_tokens_to_ids(end) for end in family.ends]
    continuation = Continuation(tokenizer, [TOOL], dict(family.arguments), stops)
    prompt = continuation.prompt_ids([QUESTION])
    for text in ("TheAssistantsOwnWords", "TheAssistantsOwnWordsX", 'a "b" TheAssistantsOwnWords'):
        new = {"role": role, "content": text}
        if role == "tool":
            new = a_result(TOOL, 1, text)
        # A reply that no template writes as it is, so that the message is appended.
        for reply in ("<think>\na\n</think>\n\n 5 \n", "  hi \n"):
            sampled = sampled_by(family, tokenizer, reply)
            try:
                extension = continuation.extend([QUESTION], prompt, sampled, [new])
            except RenderError:
                assert role != "user"
                continue
            read = tokenizer.decode(extension.token_ids)
            assert text in read or json.dumps(text)[1:-1] in read


def test_a_message_that_the_template_moves_to_the_front_is_refused() -> None:
    family = BY_NAME["deepseek v3"]
    tokenizer = tokenizer_of(family)
    continuation = Continuation(tokenizer)
    prompt = continuation.prompt_ids([QUESTION])
    sampled = sampled_by(family, tokenizer, "5")
    new = [{"role": "system", "content": "Be brief."}]
    words = r"\(system\).*puts the message of system elsewhere; task\.history=template can"
    with pytest.raises(RenderError, match=words):
        continuation.extend([QUESTION], prompt, sampled, new)
