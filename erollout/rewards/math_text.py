"""Normalisation of mathematical answers as people write them. Text only: does not need sympy."""

import re
from dataclasses import dataclass
from fractions import Fraction

from erollout.rewards.answers import marked_answer

_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
"""Full-width forms of ASCII, as Chinese and Japanese text has them."""
_SIGNS = str.maketrans({"−": "-", "\u3000": " ", "\xa0": " ", "\u202f": " ", "。": ".", "⁄": "/", "π": r"\pi "})
_HIGH = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}
_SPACING = re.compile(r"(?<!\\)\\[,!;: ]|~|\\(?:quad|left|right)(?![A-Za-z])")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_WRAPPERS = (("__", "__"), ("*", "*"), ("`", "`"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_QUOTES = (('"', '"'), ("'", "'"), ("“", "”"), ("「", "」"))

_CURRENCY = r"(?:[$€£¥₹₩]|\\\$|US\$|USD|EUR|RMB)"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)"
_SCIENTIFIC = r"(?:[eE](?P<e>[+-]?\d{1,3})|\s*(?:×|x|\*|\\times|\\cdot)\s*10\s*\^\s*\{?\s*(?P<ten>[+-]?\d{1,3})\s*\}?)"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*{_CURRENCY}?\s*(?P<minus>-?)(?:(?P<whole>\d+)\s+(?P<top>\d+)/(?P<bottom>\d+)"
    rf"|(?P<value>{_DECIMAL})(?:{_SCIENTIFIC}|\s*/\s*(?P<divisor>{_DECIMAL}))?)(?P<percent>\s*\\?%)?(?P<rest>.*)",
    re.DOTALL,
)
_UNIT = re.compile(
    r"\s*(?:[^\W\d_]{2,}|[mgshlLKNJWVACF](?![^\W\d_])|[^\W\d_a-zA-Z]|°[CF]?|\\?\^?\{?\\circ\}?|[€£¥₹₩$])"
    r"(?:[^\W\d_]|[\s.,;:!'/·()°-]|\^?\{?[23²³]\}?(?!\d))*",
)
_CHANGES_VALUE = re.compile(
    r"\b(?:or|and|to|by|times|plus|minus|over|hundred|thousands?|millions?|billions?|trillions?|dozens?|half|halves|thirds?|"
    r"quarters?|squared|cubed|percent|percentage|pct|mod|pi|sqrt|sin|cos|tan|log|ln|exp|more|less|not)\b|[百千万萬亿億半或和]",
    re.IGNORECASE,
)
"""Words that change the value of a number, or make it one of several."""

_UNITS = {
    "money": (
        "$ dollar dollars usd",
        "¢ cent cents",
        "€ euro euros eur",
        "£ gbp",
        "₹ rupee rupees inr",
        "₩ won krw",
        "yen jpy",
        "yuan rmb cny 元",
    ),
    "angle": ("° degree degrees deg", "radian radians rad"),
    "length": (
        "km kilometer kilometers kilometre kilometres",
        "m meter meters metre metres",
        "cm centimeter centimeters centimetre centimetres",
        "mm millimeter millimeters millimetre millimetres",
        "mile miles mi",
        "yard yards yd",
        "foot feet ft",
        "inch inches",
    ),
    "time": (
        "second seconds sec secs s",
        "minute minutes min mins",
        "hour hours hr hrs h",
        "day days",
        "week weeks",
        "month months",
        "year years",
    ),
    "mass": ("kg kilogram kilograms", "g gram grams", "mg milligram milligrams", "pound pounds lb lbs", "ounce ounces oz"),
    "volume": ("l liter liters litre litres", "ml milliliter milliliters millilitre millilitres", "gallon gallons"),
}
_UNIT_OF = {name: (kind, names) for kind, units in _UNITS.items() for names in units for name in names.split()}
"""Quantity and unit by each name of the unit."""

_MEASURE = re.compile(
    r"\s*(?:(?P<square>sq(?:uare)?\b\.?)|(?P<cubic>cu(?:bic)?\b\.?))?\s*(?P<name>[^\W\d_]+|[¢$€£₹₩°]|\\?\^?\{?\\circ)\s*"
    r"(?:\^?\s*\{?(?P<power>[23²³])\}?)?"
)
_POWERS = {"²": "2", "³": "3"}
_SUBSCRIPT = re.compile(r"\(?([0-9A-Za-z]+)\)?_\{?(?:\\text\{)?(\d{1,2})\}*")

_CHOICE = re.compile(r"(?:(?i:option|choice|answer)\s*)?[(\[]?([A-Z])(?:[)\].:](?:\s.*)?)?", re.DOTALL)
_LOWER_CHOICE = re.compile(r"[(\[]?([a-e])[)\].]?")
_SAID = (
    re.compile(
        r"answers?\b(?:\s+(?:to|for|of)\b[^.\n:]{0,80}?)?\s*(?:\*\*)?\s*(?:\bis\b|\bequals\b|=|[:：])\s*[:：]?(?P<said>[^\n]+)",
        re.IGNORECASE,
    ),
    re.compile(
        r"(?:答案|结果|結果|答え|答|정답|답)\s*(?:应该|應該)?\s*(?:是|为|為|は|은|는|选|選|等于|等於|[:：])\s*[:：]?(?P<said>[^\n]+)"
    ),
    re.compile(r"(?:选|選)(?:择|擇)?\s*[:：]?\s*(?P<said>[A-Z](?![A-Za-z])[^\n]*)"),
)
_SENTENCE_END = re.compile(r"[.!?](?:\*\*|\$)?(?=\s|$)|[。！？；，]|,\s(?=[^\W\d_])")
_WORD = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{3,}")
_FUNCTIONS = {
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "log",
    "exp",
    "sqrt",
    "frac",
    "arcsin",
    "arccos",
    "arctan",
    "max",
    "min",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, with its possible readings."""

    text: str
    """Text without decoration, still in LaTeX if it was."""
    number: Fraction | None = None
    """Value of a number, possibly with a unit; of a percentage, the part before the sign."""
    percent: bool = False
    unit: tuple[str, str] | None = None
    """Quantity and unit, with its power, of a number with a common unit."""
    base: int | None = None
    """Base given by a subscript; `number` is then None."""
    choice: str | None = None
    """A to Z, if it can be read as the letter of a choice."""
    is_words: bool = False
    """Whether it consists of words, which would otherwise be parsed as a product of variables."""


def final_answers(response: str) -> list[str]:
    """Candidates for a response's answer, most certain first: the marked part, else the text after "the answer is"."""
    marked = marked_answer(response)
    if marked is None:
        said = _said(response)
        return [] if said is None else [said]
    if "####" in response and marked == response.rpartition("####")[2].strip():
        marked = next(iter(marked.splitlines()), "")
    inner = marked_answer(marked)
    return [marked if inner is None or marked == inner else inner]


def read_answer(text: str) -> Answer:
    """Parse an answer: its text without decoration, and its readings."""
    plain = _undecorated(text)
    if (based := _SUBSCRIPT.fullmatch(plain.replace(" ", ""))) and not based[1].isalpha():  # a letter's is an index
        return Answer(based[1], base=int(based[2]))
    number, percent, unit = _number(plain)
    choice = _CHOICE.fullmatch(plain) or _LOWER_CHOICE.fullmatch(plain)
    words = [word for word in _WORD.findall(re.sub(r"\\[A-Za-z]+", " ", plain)) if word.lower() not in _FUNCTIONS]
    return Answer(
        plain,
        number,
        percent,
        unit,
        choice=choice.group(1).upper() if choice and number is None else None,
        is_words=bool(words) and number is None,
    )


def only_value(answer: Answer) -> Answer | None:
    """The value of a longer answer: after its equals sign, or the only formula or number in it."""
    text = answer.text
    if text.count("=") == 1 and "," not in text:
        return read_answer(text.partition("=")[2])
    formulas = re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)", text)
    if len(formulas) == 1:
        return read_answer(formulas[0][0] or formulas[0][1])
    numbers = re.findall(rf"(?<![\w.^/{{])-?{_CURRENCY}?{_DECIMAL}(?:\s*/\s*\d+)?(?:\s*\\?%)?(?![\w^/}}])", text)
    if answer.is_words and len(numbers) == 1 and not _CHANGES_VALUE.search(text) and not re.search(r"[\\^+*=<>]", text):
        return read_answer(numbers[0])
    return None


def _undecorated(text: str) -> str:
    text = text.translate(_WIDE).translate(_SIGNS)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda high: f"^{{{high.group().translate(_HIGH)}}}", text)
    text = re.sub("[" + "".join(_VULGAR) + "]", lambda sign: f" {_VULGAR[sign.group()]}", text)
    text = _SPACING.sub(" ", text.replace("{,}", ",").replace(r"\!", ""))
    text = re.sub(r"^\s*(?:negative|minus)\s+(?=[\d.])", "-", text, flags=re.IGNORECASE)
    text = _TEXT.sub(r" \1 ", text).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    text = re.sub(r"(?<=[\w)])\*\*(?=[\w(])", "^", text).replace("**", "")  # a power, else bold
    before = None
    while text != before:
        before, text = text, text.strip().lstrip("=:≈").rstrip(".,;:").strip()
        for left, right in _WRAPPERS + _QUOTES:
            inner = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and len(text) >= len(left + right) and left not in inner:
                text = inner
    return re.sub(r"\s+", " ", text)


def _number(text: str) -> tuple[Fraction | None, bool, tuple[str, str] | None]:
    """Exact value, whether it is a percentage, and unit; None if there is more than a number with a unit."""
    found = _NUMBER.fullmatch(text) if len(text) < 300 else None
    if found is None:
        return None, False, None
    rest = found["rest"]
    if rest and (not _UNIT.fullmatch(rest) or _CHANGES_VALUE.search(rest)):
        percent = re.fullmatch(r"\s*(?:percent|percentage|pct)[\s.]*", rest, re.IGNORECASE)
        if percent is None or found["percent"]:
            return None, False, None
    else:
        percent = None
    try:
        value = _value(found)
    except ZeroDivisionError:
        return None, False, None
    negative = (found["sign"] == "-") != (found["minus"] == "-")
    return -value if negative else value, bool(found["percent"] or percent), _unit(text, rest)


def _unit(text: str, rest: str) -> tuple[str, str] | None:
    """The unit behind a number, else the sign of a currency before it."""
    if found := _MEASURE.match(rest):
        known = _UNIT_OF.get("°" if "circ" in found["name"] else found["name"].lower())
        power = "2" if found["square"] else "3" if found["cubic"] else _POWERS.get(found["power"] or "", found["power"])
        return known if known is None or power is None else (known[0], f"{known[1]}^{power}")
    return next((_UNIT_OF[sign] for sign in "$€£₹₩" if sign in text), None)


def _value(found: "re.Match[str]") -> Fraction:
    if found["whole"] is not None:
        return int(found["whole"]) + Fraction(int(found["top"]), int(found["bottom"]))
    value = Fraction(found["value"].replace(",", ""))
    if found["divisor"] is not None:
        return value / Fraction(found["divisor"].replace(",", ""))
    exponent = int(found["e"] or found["ten"] or 0)
    return value * Fraction(10) ** exponent


def _said(response: str) -> str | None:
    """Text after the last "the answer is", up to the end of the sentence."""
    found = [match for pattern in _SAID for match in pattern.finditer(response)]
    if not found:
        return None
    said = max(found, key=lambda match: match.start("said"))["said"].strip()
    return _SENTENCE_END.split(said, maxsplit=1)[0] if said else None
