"""Conversations that are kept: the same as the server's, searched with and without an index, kept apart by key."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from llmasos.apps.agent import Agent, ScriptedModel, tool
from llmasos.apps.memory import Memory
from llmasos.apps.memory.items import items_of, messages_of
from llmasos.errors import InvalidInputError, NotFoundError
from llmasos.store.database import Database

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How hot is green tea?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "look", "content": "70"},
    {"role": "assistant", "content": "70 degrees."},
]


def test_messages_come_back_as_they_went_in() -> None:
    assert messages_of(items_of(TALK)) == TALK
    both = [{"role": "assistant", "content": "I look.", "tool_calls": [CALL, {**CALL, "id": "c2"}]}]
    assert messages_of(items_of(both)) == both
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert messages_of(items_of(parts)) == [{"role": "user", "content": "a\nb"}]


def test_a_conversation_is_made_listed_renamed_exported_and_deleted(database: Database) -> None:
    memory = Memory(database)
    tea, bread = memory.create(TALK), memory.create(title="Bread")
    assert memory.messages(tea) == TALK
    memory.add(bread, [{"role": "user", "content": "How long?"}])
    assert [(one.id, one.title, one.num_messages) for one in memory.list()] == [
        (bread, "Bread", 1),
        (tea, "How hot is green tea?", 3),
    ]
    memory.rename(tea, "Tea")
    exported = {one["id"]: one for one in memory.export()}
    assert exported[tea]["title"] == "Tea" and exported[tea]["messages"] == TALK
    memory.delete(tea)
    for asked in (memory.messages, memory.get, memory.delete):
        with pytest.raises(NotFoundError):
            asked(tea)
    assert memory.search("green") == []


@pytest.mark.parametrize("is_indexed", [True, False])
def test_a_search_finds_all_words_and_parts_of_them_in_any_case(database: Database, is_indexed: bool) -> None:
    memory = Memory(database)
    if not is_indexed:
        memory._has_index = False
    tea = memory.create([{"role": "user", "content": "Green TEA, 100% pure_leaf"}])
    chinese = memory.create([{"role": "user", "content": "怎么泡绿茶？水温多少度"}])
    other = memory.create([{"role": "user", "content": "Bread and jam"}])

    def found(query: str) -> list[str]:
        return [one.id for one in memory.search(query)]

    assert found("tea") == found("green tea") == found("GREE") == found('"green tea"') == [tea]
    assert found("绿茶") == found("泡绿茶") == found("水温多少") == [chinese]
    assert found("green bread") == found('"tea green"') == found("100%%") == found("pure*leaf") == []
    assert found("100%") == found("pure_l") == [tea]
    assert found('OR "') == [] and found("jam") == [other] and found("a") == [other, tea]
    memory.add(other, [{"role": "assistant", "content": "With tea " + "and more " * 100}])
    [first, *_] = memory.search("with tea")
    assert first.id == other and first.snippet.startswith("With tea") and first.snippet.endswith("…")
    for nothing in ("", "  ", '""'):
        with pytest.raises(InvalidInputError):
            memory.search(nothing)


def test_the_index_has_what_was_written_before_it_and_forgets_what_is_deleted(tmp_path: Path) -> None:
    with Memory.open(f"sqlite:///{tmp_path / 'own.db'}") as memory:
        first = memory.create(TALK)
        assert [one.id for one in memory.search("green")] == [first]
        second = memory.create(TALK)
        assert len(memory.search("green")) == 2
        memory.delete(first)
        assert [one.id for one in memory.search("green")] == [second]
        with memory._database.session(read_only=True) as session:
            num = session.execute(
                text("SELECT count(*) FROM conversation_search WHERE conversation_search MATCH 'green'")
            )
            assert num.scalar() == 1


def test_keys_do_not_see_each_others_conversations(database: Database) -> None:
    ours, theirs = Memory(database, "key_a"), Memory(database, "key_b")
    id = ours.create(TALK)
    assert theirs.list() == [] and theirs.search("green") == [] and Memory(database).search("green") == []
    with pytest.raises(NotFoundError):
        theirs.messages(id)
    assert [one.id for one in ours.search("green")] == [id]


def test_an_agent_adds_whole_turns_only(database: Database) -> None:
    @tool(destructive=True)
    def send() -> str:
        """Send it."""
        return "sent"

    memory = Memory(database)
    id = memory.create()
    model = ScriptedModel([{"calls": [{"name": "send"}]}, "Sent.", "Hello."])
    agent = Agent(model, tools=[send], memory=memory, system="Be brief.", keep=False)
    run = agent.run("Send it.", conversation=id)
    assert run.state == "requires_action" and memory.messages(id) == []
    agent.resume(run, True)
    assert [one["role"] for one in memory.messages(id)] == ["user", "assistant", "tool", "assistant"]
    agent.run("Hi.", conversation=id)
    assert [one["content"] for one in model.asked[-1].messages][:2] == ["Be brief.", "Send it."]
    assert len(memory.messages(id)) == 6
