"""A conversation that goes on is continued with the tokens that were sampled; one that was changed is rendered, and says so."""

import json

import pytest

from art_mcp.agent.rollout import answers
from art_mcp.core.dialect import TemplateDialect
from art_mcp.core.template import ChatTemplate
from art_mcp.serve.asked import Offered
from art_mcp.serve.conversations import Conversations, Prompt
from art_mcp.serve.messages import read_tools
from art_mcp.serve.turn import Voice
from art_mcp.types import ToolResult
from tests.agent.players import calls, dialect, tokenizer, tokens
from tests.serve.guests import LOOK, USER, Told, direct, voice_of

pytestmark = pytest.mark.anyio

SPACED = '<tool_call>\n{"name": "add",   "arguments": {"b": 3, "a": 2}}\n</tool_call>'
"""A call as no template writes it: rendered again, it would be other tokens."""
TURN = f"Let me see.\n{SPACED}\n{calls(('add', {'a': 1, 'b': 1}))}"
SYSTEM = {"role": "system", "content": "You add."}


def results(message):
    return [{"role": "tool", "tool_call_id": call.id, "content": f"{at + 5}"} for at, call in enumerate(message.tool_calls)]


def rebuilt(message, **changes):
    """The message as a client writes it that keeps what it needs."""
    called = [
        {
            "id": call.id,
            "type": "function",
            "function": {
                "name": call.function.name,
                "arguments": json.dumps(json.loads(call.function.arguments), indent=3),
            },
        }
        for call in message.tool_calls
    ]
    return {"role": "assistant", "content": message.content, "tool_calls": called} | changes


SPELLINGS = {
    "the object": lambda message: message,
    "dumped": lambda message: message.model_dump(),
    "dumped without None": lambda message: message.model_dump(exclude_none=True),
    "dumped as json": lambda message: json.loads(message.model_dump_json(exclude_unset=True)),
    "rebuilt": rebuilt,
    "in parts": lambda message: rebuilt(message, content=[{"type": "text", "text": message.content}]),
    "with more": lambda message: rebuilt(message, annotations=[], refusal=None, name="bot", art_mcp=1, reasoning_content="Hm."),
}


async def converse(spell, *, turn=TURN, tools=(LOOK,), steps=(0,), following=results, opening=(SYSTEM, USER), again=None):
    """Two turns; what the second one was asked, and its answer."""
    told = Told([turn, "8"], steps=steps)
    async with direct(voice_of(told)) as (client, _):
        first = await client.chat.completions.create(model="told", messages=list(opening), tools=list(tools))
        message = first.choices[0].message
        messages = [*(again or opening), spell(message), *following(message)]
        second = await client.chat.completions.create(
            model="told", messages=messages, tools=list(tools), extra_body={"return_token_ids": True}
        )
    return told, first, second


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
async def test_the_next_turn_follows_what_was_sampled_however_the_client_spells_it(spell):
    told, _, second = await converse(spell)
    (first, _), (prompt, _) = told.asked
    sampled = (*first, *tokens(TURN))
    assert second.art_mcp["bridged"]
    assert prompt[: len(sampled)] == sampled
    assert tuple(second.prompt_token_ids) == prompt
    told_so = "<tool_response>\n5\n</tool_response>\n<tool_response>\n6\n</tool_response>"
    assert tokenizer().decode(prompt[len(sampled) :]) == f"\n<|im_start|>user\n{told_so}<|im_end|>\n<|im_start|>assistant\n"


UNFIT = calls(("add", {"a": "two", "b": 3}))


@pytest.mark.parametrize("turn", [UNFIT, f"Hm.\n{UNFIT}", f"{SPACED}\n{UNFIT}", f"<tool_call>{{</tool_call>\n{UNFIT}"])
@pytest.mark.parametrize("spell", [lambda message: message, rebuilt], ids=["the object", "rebuilt"])
async def test_what_an_agent_says_to_a_call_that_does_not_fit_is_read_as_what_our_runner_says_to_it(turn, spell):
    told, first, second = await converse(spell, turn=turn)
    assert second.art_mcp["bridged"]
    reply, found = dialect().read(tokens(turn), read_tools([Offered.model_validate(LOOK)]))
    assert len(first.choices[0].message.tool_calls) == len(found) - turn.count("{</tool_call>")
    said = [ToolResult(f"{at + 5}") for at in range(len(first.choices[0].message.tool_calls))]
    following = answers(reply, found[-len(said) :], said)
    sampled = (*told.asked[0][0], *tokens(turn))
    assert told.asked[1][0] == (*sampled, *dialect().bridge(reply, following, sampled[-1]))


async def test_a_turn_without_text_is_known_whether_its_content_is_empty_absent_or_null():
    for content in ({"content": ""}, {"content": None}, {}):
        told, _, second = await converse(
            lambda message, content=content: {**{k: v for k, v in rebuilt(message).items() if k != "content"}, **content},
            turn=SPACED,
        )
        assert second.art_mcp["bridged"]
        assert told.asked[1][0][: len(told.asked[0][0])] == told.asked[0][0]


async def test_results_are_read_in_the_order_of_their_calls():
    told, _, second = await converse(rebuilt, following=lambda message: results(message)[::-1])
    assert second.art_mcp["bridged"]
    assert "5\n</tool_response>\n<tool_response>\n6" in tokenizer().decode(told.asked[1][0])


async def test_an_agent_may_have_a_name_that_the_policy_does_not_know():
    _, _, second = await converse(
        lambda message: {"role": "assistant", "content": message.content, "name": "bot"},
        turn="It is 5.",
        following=lambda message: [USER],
    )
    assert second.art_mcp["bridged"]


async def test_a_user_may_go_on_where_the_policy_answered():
    told, _, second = await converse(
        lambda message: {"role": "assistant", "content": message.content},
        turn="It is  5 .",
        following=lambda message: [{"role": "user", "content": [{"type": "text", "text": "Sure?"}]}],
    )
    assert second.art_mcp["bridged"]
    sampled = (*told.asked[0][0], *tokens("It is  5 ."))
    assert tokenizer().decode(told.asked[1][0][len(sampled) :]) == (
        "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_a_conversation_goes_on_token_for_token_under_a_newer_policy():
    told, first, second = await converse(rebuilt, steps=(0, 1))
    assert (first.model, second.model) == ("told@0", "told@1")
    assert second.art_mcp == {"bridged": True, "policy": "told@1"}
    sampled = (*told.asked[0][0], *tokens(TURN))
    assert told.asked[1][0][: len(sampled)] == sampled


async def test_a_turn_that_was_cut_is_closed_and_goes_on():
    told = Told(["One, two, three.", "8"])
    async with direct(voice_of(told)) as (client, _):
        first = await client.chat.completions.create(model="told", messages=[USER], stop=["thr"])
        message = first.choices[0].message
        messages = [USER, message, {"role": "user", "content": "Go on."}]
        second = await client.chat.completions.create(model="told", messages=messages)
    assert second.art_mcp["bridged"]
    cut = told.asked[1][0][len(told.asked[0][0]) :]
    assert tokenizer().decode(cut).startswith("One, two, thr")
    assert tokenizer().decode(cut).endswith("<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n")


CHANGED = {
    "another system message": {"again": ({"role": "system", "content": "You subtract."}, USER)},
    "a question left out": {"again": (SYSTEM,)},
    "other text": {"spell": lambda message: rebuilt(message, content="Let me think.")},
    "another argument": {
        "spell": lambda message: {
            **(own := rebuilt(message)),
            "tool_calls": [
                {**own["tool_calls"][0], "function": {"name": "add", "arguments": '{"a": 2, "b": 4}'}},
                own["tool_calls"][1],
            ],
        }
    },
    "a call left out": {"spell": lambda message: rebuilt(message, tool_calls=rebuilt(message)["tool_calls"][:1])},
    "other ids": {
        "spell": lambda message: rebuilt(message, tool_calls=[{**call, "id": "x"} for call in rebuilt(message)["tool_calls"]])
    },
    "an answer put into its mouth": {
        "following": lambda message: [*results(message), {"role": "assistant", "content": "8"}, USER]
    },
    "a system message in the middle": {"following": lambda message: [*results(message), SYSTEM]},
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
async def test_a_history_that_was_changed_is_rendered_afresh_and_says_so(change):
    told, _, second = await converse(**{"spell": rebuilt} | change)
    assert not second.art_mcp["bridged"]
    assert SPACED not in tokenizer().decode(told.asked[1][0])


async def test_other_tools_are_another_conversation():
    told = Told([TURN, "8"])
    async with direct(voice_of(told)) as (client, _):
        first = await client.chat.completions.create(model="told", messages=[USER], tools=[LOOK])
        message = first.choices[0].message
        other = {**LOOK, "function": {**LOOK["function"], "description": "Sums."}}
        messages = [USER, message, *results(message)]
        second = await client.chat.completions.create(model="told", messages=messages, tools=[other])
    assert not second.art_mcp["bridged"]


async def test_rollouts_whose_texts_agree_and_whose_tokens_do_not_are_kept_apart_by_their_calls():
    """Both turns are the same message; only what was sampled for it differs."""
    usual = calls(("add", {"b": 3, "a": 2}))
    assert tokens(usual) != tokens(SPACED)
    told = Told([usual, SPACED, "8", "8"])
    async with direct(voice_of(told)) as (client, _):
        both = await client.chat.completions.create(model="told", messages=[USER], tools=[LOOK], n=2)
        for choice, turn in zip(both.choices, (usual, SPACED), strict=True):
            messages = [USER, choice.message, *results(choice.message)]
            await client.chat.completions.create(model="told", messages=messages, tools=[LOOK])
            sampled = (*told.asked[0][0], *tokens(turn))
            assert told.asked[-1][0][: len(sampled)] == sampled


def spelled(text):
    """The same turn sampled token by token in another way: a letter at a time."""
    *others, stop = tokens(text)
    letters = [token for letter in text for token in tokenizer().encode(letter)]
    assert others != letters
    assert tokenizer().decode(letters) == text
    return [*letters, stop]


async def test_rollouts_whose_answers_agree_and_whose_tokens_do_not_are_rendered_afresh_rather_than_mixed_up():
    """Without calls there is nothing in a message that tells such rollouts apart."""
    usual, other = tokens("It is 5."), spelled("It is 5.")
    told = Told([usual, other, usual, other, *["Yes."] * 4])
    async with direct(voice_of(told)) as (client, desk):
        both = await client.chat.completions.create(model="told", messages=[USER], n=2)
        alone = [await client.chat.completions.create(model="told", messages=[USER]) for _ in range(2)]
        for answer in (both, *alone):
            for choice in answer.choices:
                messages = [USER, choice.message, {"role": "user", "content": "Sure?"}]
                second = await client.chat.completions.create(model="told", messages=messages)
                assert not second.art_mcp["bridged"]
                assert tokenizer().decode(told.asked[-1][0]).count("It is 5.") == 1
    assert len(desk.voice("told").conversations) == 2 + 1  # the same tokens again are not kept twice


THINKER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>"
    "\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def thinker(sampler):
    """A voice whose template keeps thoughts apart."""
    template = ChatTemplate(THINKER, name="thinker", specials=("<|im_start|>", "<|im_end|>"))
    return Voice(sampler, TemplateDialect(tokenizer(), template, stop_token_ids=tokens("")))


def thought(thoughts):
    return f"<think>\n{thoughts}\n</think>\n\nIt is 5."


async def test_rollouts_that_thought_otherwise_and_said_the_same_are_told_apart_by_the_thoughts_that_clients_send_back():
    turns = [thought("One."), thought("Two."), "It is 5."]
    told = Told([*turns, "Yes."])
    async with direct(thinker(told)) as (client, _):
        answer = await client.chat.completions.create(model="told", messages=[USER], n=3)
        assert [choice.message.content for choice in answer.choices] == ["It is 5."] * 3

        async def go_on(**thoughts):
            said = {"role": "assistant", "content": "It is 5.", **thoughts}
            told.asked[:] = told.asked[:3]
            second = await client.chat.completions.create(model="told", messages=[USER, said, USER])
            return second.art_mcp["bridged"], tokenizer().decode(told.asked[-1][0])

        opening = tokenizer().decode(told.asked[0][0])
        for name in ("reasoning_content", "reasoning"):
            for turn, thoughts in zip(turns, ("One.", " Two.\n"), strict=False):
                bridged, text = await go_on(**{name: thoughts})
                assert bridged
                assert text.startswith(f"{opening}{turn}<|im_end|>")
        for unknown in ({}, {"reasoning": None}, {"reasoning": ["One."]}):
            bridged, text = await go_on(**unknown)
            assert not bridged
            assert "<think>" not in text
        bridged, _ = await go_on(
            reasoning="Three."
        )  # none has these, but the one without any may have got them from the client
        assert bridged
        assert answer.choices[1].message.reasoning_content == "Two."


async def test_thoughts_are_compared_in_every_turn_of_a_conversation():
    told = Told([thought("One."), thought("Two."), "Yes.", "Yes.", "No."])
    async with direct(thinker(told)) as (client, _):
        firsts = (await client.chat.completions.create(model="told", messages=[USER], n=2)).choices
        for first, turn in zip(firsts, ("One.", "Two."), strict=True):
            second = await client.chat.completions.create(model="told", messages=[USER, first.message, USER])
            assert second.art_mcp["bridged"]
            assert thought(turn) in tokenizer().decode(told.asked[-1][0])
        for first, turn in zip(firsts, ("One.", "Two."), strict=True):  # both go on with the same words
            told.asked[:] = told.asked[:4]
            messages = [USER, first.message, USER, second.choices[0].message, USER]
            third = await client.chat.completions.create(model="told", messages=messages)
            assert third.art_mcp["bridged"]
            assert thought(turn) in tokenizer().decode(told.asked[-1][0])


async def test_a_turn_with_other_thoughts_than_those_that_were_sampled_is_another_one():
    told = Told([thought("One."), "Yes."])
    async with direct(thinker(told)) as (client, _):
        await client.chat.completions.create(model="told", messages=[USER])
        said = {"role": "assistant", "content": "It is 5.", "reasoning_content": "Two."}
        second = await client.chat.completions.create(model="told", messages=[USER, said, USER])
    assert not second.art_mcp["bridged"]


def test_what_is_kept_is_bounded_and_what_was_used_longest_ago_goes_first():
    tools = read_tools(())
    kept = Conversations(count=3, tokens=70)

    def say(word, length):
        prompt = Prompt(tuple(range(length - 1)), 0, bridged=False)
        reply = {"role": "assistant", "content": word}
        kept.remember([USER], tools, prompt=prompt, turn=[5], reply=reply, shown=reply)

    def known(word):
        messages = [USER, {"role": "assistant", "content": word}, USER]
        return kept.prompt(messages, tools, dialect=dialect()).bridged

    for word in "abcd":
        say(word, 10)
    assert (len(kept), kept.tokens) == (3, 30)
    assert [known(word) for word in "abcd"] == [False, True, True, True]
    assert known("b")
    say("e", 50)
    assert (len(kept), kept.tokens) == (3, 70)
    assert [known(word) for word in "bcde"] == [True, False, True, True]
    say("f", 71)
    assert (len(kept), kept.tokens) == (0, 0)


def test_rivals_are_forgotten_together_so_that_none_is_taken_for_the_only_one():
    tools = read_tools(())
    kept = Conversations(count=3, tokens=70)

    def say(word, first):
        prompt = Prompt((first,), 0, bridged=False)
        reply = {"role": "assistant", "content": word}
        kept.remember([USER], tools, prompt=prompt, turn=[5], reply=reply, shown=reply)

    def known(word):
        messages = [USER, {"role": "assistant", "content": word}, USER]
        return kept.prompt(messages, tools, dialect=dialect()).bridged

    say("a", 1)
    assert known("a")
    say("a", 2)
    say("b", 1)
    assert (len(kept), kept.tokens) == (3, 6)
    assert [known(word) for word in "ab"] == [False, True]
    say("c", 1)
    assert (len(kept), kept.tokens) == (2, 4)
    assert [known(word) for word in "abc"] == [False, True, True]
