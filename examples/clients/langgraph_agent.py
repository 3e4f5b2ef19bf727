"""LangGraph on langchain-openai: two tool calls in one answer, run side by side, then an answer.

``python -m examples.clients.langgraph_agent chat --model NAME``
"""

from __future__ import annotations

from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode

from examples.clients import task

CALL = r'<tool_call>\n\{"name": "%s", "arguments": \{%s\}\}\n</tool_call>'
PARALLEL = "\n".join(
    (
        CALL % ("product", '"left": [23567], "right": [23567]'),
        CALL % ("list_files", r'"suffix": "(\.py|\.md)?"'),
    )
).replace("\n", r"\n")
"""What the random model is held to by vLLM's ``structured_outputs``: two calls in the text form
that the model's own tool parser reads. The choice of the tools stays ``auto``."""


def graph(options: task.Options) -> Any:
    """model -> tools -> model."""
    tools = [tool(task.product), tool(task.list_files)]
    model = ChatOpenAI(
        model=options.model,
        seed=options.run,
        max_completion_tokens=task.TOKENS,
        streaming=options.variant == "stream",
        extra_body={"min_tokens": task.MIN_TOKENS},
    )
    held = {"min_tokens": task.MIN_TOKENS, "structured_outputs": {"regex": PARALLEL}}
    calls = model.bind_tools(tools).bind(extra_body=held)
    answers = model.bind_tools(tools, tool_choice="none")

    def ask(state: MessagesState) -> Any:
        return {"messages": [calls.invoke(state["messages"])]}

    def answer(state: MessagesState) -> Any:
        return {"messages": [answers.invoke(state["messages"])]}

    built = StateGraph(MessagesState)
    built.add_node("ask", ask)
    built.add_node("tools", ToolNode(tools))
    built.add_node("answer", answer)
    built.add_edge(START, "ask")
    built.add_edge("ask", "tools")
    built.add_edge("tools", "answer")
    built.add_edge("answer", END)
    return built.compile()


def run(options: task.Options) -> list[Any]:
    """One run, and a second question in the same conversation."""
    agent = graph(options)
    state: Any = {"messages": [SystemMessage(task.SYSTEM), HumanMessage(task.QUESTION)]}
    for question in (None, task.AGAIN):
        if question is not None:
            state["messages"].append(HumanMessage(question))
        state = agent.invoke(state)
    answers = [message for message in state["messages"] if isinstance(message, AIMessage)]
    return [
        task.said(str(m.content), (task.call(c["name"], c["args"]) for c in m.tool_calls))
        for m in answers
    ]


if __name__ == "__main__":
    task.main(("langgraph", "langchain-openai"), {"chat": run, "stream": run})
