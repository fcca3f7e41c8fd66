"""Talk to a running server with the OpenAI client: ``python examples/openai_client.py [URL]``.

Start one first, for example:

    vllm serve LiquidAI/LFM2-8B-A1B --enable-auto-tool-choice --tool-call-parser lfm2
    lfm2 demo --keep --port 8000
"""

import json
import sys

from openai import BadRequestError, OpenAI

WEATHER = {
    "type": "function",
    "function": {
        "name": "find_weather",
        "description": "Get the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def main(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    question = [{"role": "user", "content": "Repeat: apple river star"}]

    reply = client.chat.completions.create(model=model, messages=question, temperature=0)
    print("chat:", reply.choices[0].message.content)

    print("streamed: ", end="")
    events = client.chat.completions.create(
        model=model, messages=question, temperature=0, stream=True
    )
    for event in events:
        print(event.choices[0].delta.content or "", end="", flush=True)
    print()

    try:
        reply = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "What is the weather in Paris?"}],
            tools=[WEATHER],
            temperature=0,
        )
    except BadRequestError as error:  # a server started without a tool-call parser refuses tools
        print("tools:", error)
        return
    for call in reply.choices[0].message.tool_calls or []:
        print(f"tool call: {call.function.name}({json.loads(call.function.arguments)})")


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://127.0.0.1:8000")
