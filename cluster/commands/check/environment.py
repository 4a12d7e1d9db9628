"""The stage of the environment: its tools, and what the chat template makes of several turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cohort.actors.engine import stop_token_ids
from cohort.cluster.commands.check.stages import Stage
from cohort.cluster.config import Config
from cohort.rewards.environments.calls import find_parser, reads, written_call
from cohort.rewards.environments.specs import environment_spec
from cohort.rewards.environments.worker import try_environment
from cohort.rewards.prefix_proof import prove
from cohort.rewards.tool_messages import TOOL, supports_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_DIFFERENCE = 160


def check_environment(
    config: Config, model_path: str, tokenizer: PreTrainedTokenizerBase, stage: Stage
) -> None:
    """Load the environment's class and make an instance; say how its messages become tokens, and in
    which cases."""
    arguments = config.model.template_arguments
    spec = environment_spec(
        config.task,
        config.environments,
        model_path=model_path,
        template_arguments=arguments,
        # No episode is played here.
        max_length=0,
    )
    try_environment(spec)
    tools = spec.tools
    names = ", ".join(tool["function"]["name"] for tool in tools)
    what = f"tools {names}" if tools else "no tools"
    if spec.agent:
        what = "an agent, whose requests to the endpoint are the turns and bring the tools"
        if not config.model.max_length:
            stage.warn(
                "model.max_length is not set, and what the agent tells the model is not known: "
                "requests that do not fit are refused"
            )
    stage.say(f"{config.task.environment}: {what}")
    if tools and not supports_tools(tokenizer, arguments):
        stage.say(
            "the model's chat template knows no tools: they are described in the system message, "
            "and results are messages of the user"
        )
    stop_ids = stop_token_ids(model_path, tokenizer.eos_token_id)
    name = config.environments.tool_parser
    parser = find_parser(name, tokenizer, [TOOL])
    written = written_call(tokenizer, arguments, stop_ids)
    if (tools or spec.agent) and written is not None and not reads(parser, written):
        stage.warn(
            f"environments.tool_parser={name} does not find the calls that the model's chat "
            f"template writes: {written.strip()[:LONGEST_DIFFERENCE]!r}; set it to a parser of "
            "vLLM's that does"
        )
    lines = prove(tokenizer, tools, arguments, stop_ids)
    exact = [line.case for line in lines if line.result == "exact"]
    stage.say(f"appended exactly as the chat template writes it: {', '.join(exact) or 'nothing'}")
    for line in lines:
        why = (line.why or "")[:LONGEST_DIFFERENCE]
        if line.result == "rewritten":
            stage.say(
                f"the template rewrites {line.case}: {why}; task.history={config.task.history} "
                + ("appends to it anyway" if config.task.history == "append" else "forks there")
            )
        elif line.result == "refused":
            stage.warn(f"the template cannot continue {line.case}: {why}")
    limits = config.environments
    stage.say(
        f"an episode has at most {limits.max_turns} turns of {config.actors.max_tokens} tokens and "
        f"{limits.max_tool_calls} tool calls (environments.max_turns, environments.max_tool_calls)"
    )
