"""The words that the demo model's questions are made of, and the tools that they name."""

from __future__ import annotations

from dataclasses import dataclass

# Short and common, so that the tokenizer makes one token of each.
_WORD_LIST = """
acid apple arm army baby back ball band bank bark barn base bath bean bear bed bee bell belt bird
boat bone book boot bowl box boy bread brick brush bus cake camp card cat chair chalk cloud coal
coat coin cook cord corn cow crow cup dark desk dish dog door dove drum duck dust ear east egg
farm fire fish flag floor flute foam fog fork fox frog fruit game gate gift glass glove goat gold
grain grape grass hand hat hill home honey hook horn horse ice ink iron island jar juice key king
kite knee lake lamp leaf lemon lime lion lock map mask meat milk mill mint moon moss mouse mud
nail neck nest night north nose nut oak oil owl page paint pan park peach pear pen piano pie pig
pine pipe plum pond queen rain ring river road rock roof root rope rose salt sand seed shell ship
shoe silk snow soap song soup spoon star stone sugar sun table tail tea tent tiger toe tower toy
train tree wall water wave west whale wind wine wolf wood
"""
WORDS: tuple[str, ...] = tuple(_WORD_LIST.split())

CITIES: tuple[str, ...] = (
    *(
        "Paris",
        "London",
        "Berlin",
        "Rome",
        "Madrid",
        "Oslo",
        "Tokyo",
        "Delhi",
        "Cairo",
        "Lima",
        "Boston",
        "Vienna",
    ),
    *(
        "Dublin",
        "Prague",
        "Athens",
        "Lisbon",
        "Seoul",
        "Quito",
        "Zurich",
        "Kyoto",
        "Nairobi",
        "Helsinki",
        "Umea",
        "Yerevan",
    ),
)

NAMES: tuple[str, ...] = (
    *(
        "Anna",
        "Ben",
        "Clara",
        "David",
        "Emma",
        "Felix",
        "Grace",
        "Hugo",
        "Iris",
        "Jack",
        "Karl",
        "Lena",
        "Mia",
        "Noah",
    ),
    *(
        "Olga",
        "Paul",
        "Quinn",
        "Rosa",
        "Sam",
        "Tina",
        "Uma",
        "Victor",
        "Wanda",
        "Xenia",
        "Yara",
        "Zoe",
    ),
)

ROOMS: tuple[str, ...] = (
    "kitchen",
    "bathroom",
    "bedroom",
    "garden",
    "hall",
    "cellar",
    "office",
    "garage",
)


@dataclass(frozen=True)
class ToolKind:
    """A family of tools that do one thing under different names.

    Attributes:
        names: what the function may be called.
        description: one sentence.
        parameters: per argument the names it may have, its JSON type and what fills it (see ``tasks._filler``).
        requests: how a user asks; ``{0}`` and ``{1}`` stand for the arguments in the order of ``parameters``.
    """

    names: tuple[str, ...]
    description: str
    parameters: tuple[tuple[tuple[str, ...], str, str], ...]
    requests: tuple[str, ...]


TOOL_KINDS: tuple[ToolKind, ...] = (
    ToolKind(
        ("get_weather", "find_weather", "weather"),
        "Get the weather of a city",
        ((("city", "place", "location"), "string", "city"),),
        (
            "What is the weather in {0}?",
            "How is the weather in {0} today?",
            "Tell me the weather in {0}.",
        ),
    ),
    ToolKind(
        ("get_time", "local_time", "clock"),
        "Get the time of a city",
        ((("city", "place", "location"), "string", "city"),),
        ("What time is it in {0}?", "Tell me the time in {0}."),
    ),
    ToolKind(
        ("set_alarm", "wake_up"),
        "Set an alarm",
        ((("hour", "time"), "integer", "hour"),),
        ("Wake me up at {0}.", "Set an alarm for {0}."),
    ),
    ToolKind(
        ("send_mail", "write_mail", "mail"),
        "Send a mail to a person",
        ((("to", "person", "name"), "string", "name"), (("text", "message"), "string", "words")),
        ("Send a mail to {0} that says {1}.", "Write {0} a mail with the text {1}."),
    ),
    ToolKind(
        ("play_song", "play_music"),
        "Play a song",
        ((("title", "song"), "string", "words"),),
        ("Play the song {0}.", "I want to hear {0}."),
    ),
    ToolKind(
        ("add", "get_sum"),
        "Add two numbers",
        ((("a", "x"), "integer", "number"), (("b", "y"), "integer", "number")),
        ("Use a tool to add {0} and {1}.", "Add {0} and {1} with a tool."),
    ),
    ToolKind(
        ("set_light", "light"),
        "Set the light of a room",
        ((("room", "place"), "string", "room"), (("level", "value"), "integer", "number")),
        ("Set the light in the {0} to {1}.", "I want the light in the {0} at {1}."),
    ),
    ToolKind(
        ("add_note", "save_note"),
        "Save a note",
        ((("text", "note"), "string", "words"),),
        ("Save a note: {0}.", "Note down {0}."),
    ),
)
