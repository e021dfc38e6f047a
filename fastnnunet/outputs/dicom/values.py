"""Attributes of DICOM headers as PACS and anonymisers leave them, made legal: values by their kind (PS3.5 6.2).

Old forms of dates, times and numbers are rewritten, what is too long is shortened, and what says nothing legal is left
empty.
"""

import datetime
import math
import re
from collections.abc import Callable, Mapping

CHARACTERS = {"LO": 64, "SH": 16, "CS": 16, "AE": 16, "ST": 1024, "LT": 10240, "UC": 2**31, "UT": 2**31, "UR": 2**31}
_PARAGRAPHS = ("ST", "LT", "UT", "UR")  # one value, in which a backslash is a letter
_SEXES = {"M": "M", "MALE": "M", "F": "F", "FEMALE": "F", "O": "O", "OTHER": "O"}
_DATE = re.compile(r"(\d{4})([-./ ]?)(\d\d)\2(\d\d)")
_TIME = re.compile(r"(\d\d)(?::?([0-5]\d)(?::?([0-5]\d|60)(?:[.,](\d{1,6})\d*)?)?)?")
_DATE_TIME = re.compile(r"\d{4,14}(\.\d{1,6})?([+-]\d{4})?")
_AGE = re.compile(r"(\d{1,3}) *([DWMY])")
_UID = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*))*")
_NUMBER_CHARACTERS = 16


def mended(vr: str, text: str, *, single: bool) -> tuple[list[str], str]:
    """Legal values of an attribute of this kind, and what was done to them ("" for nothing).

    `text` is decoded, with a backslash between values; `single`: there may be but one.
    """
    texts = [text] if vr in _PARAGRAPHS else text.split("\\")
    texts = [part.rstrip("\0 ") if vr in _PARAGRAPHS else part.strip("\0 ") for part in texts]
    done = []
    if single and len(texts) > 1:
        texts = texts[:1]
        done.append("only the first value kept")
    values = []
    for part in texts:
        value, what = _mend(vr, part) if part else ("", "")
        values.append(value)
        done.append(what)
    return values, ", ".join(dict.fromkeys(filter(None, done)))


def mended_sex(text: str) -> tuple[str, str]:
    """PatientSex: M, F, O or nothing."""
    word = text.strip("\0 ")
    sex = _SEXES.get(word.upper(), "")
    if sex == word:
        return sex, ""
    return sex, f"written as {sex}" if sex else "left empty, it is none of M, F and O"


def positive(text: str) -> float | None:
    """The first value of an attribute as a number above 0; None where it is none."""
    number = _number(text.split("\\")[0])
    return number if number is not None and number > 0 else None


def one_line(text: str, characters: int = CHARACTERS["LO"]) -> str:
    """A text of our own as a value of kind LO (or SH): no control characters, no backslash, not too long."""
    return _without_control(text).replace("\\", "/").strip()[:characters].strip()


def _mend(vr: str, text: str) -> tuple[str, str]:
    mend = _MENDERS.get(vr)
    if mend is not None:
        value = mend(text)
        if value is None:
            return "", f"left empty, it is {_NAMES[vr]}"
        return value, "" if value == text else "rewritten"
    if vr == "PN":
        return _name(text)
    value = text if vr in _PARAGRAPHS else _without_control(text)
    if len(value) > CHARACTERS[vr]:
        return value[: CHARACTERS[vr]].strip(), f"shortened to {CHARACTERS[vr]} characters"
    return value, "" if value == text else "control characters taken out"


def _name(text: str) -> tuple[str, str]:
    """Up to three ways to write a name, each of five parts and 64 characters."""
    groups = [_without_control(group) for group in text.split("=")][:3]
    short = ["^".join(group.split("^")[:5])[:64].strip() for group in groups]
    value = "=".join(short)
    return value, "" if value == text else "shortened to 64 characters or five parts"


def _without_control(text: str) -> str:
    return "".join(c for c in text if c >= " " and not "\x7f" <= c <= "\x9f")


def _date(text: str) -> str | None:
    match = _DATE.fullmatch(text)
    if match is None:
        return None
    year, _, month, day = match.groups()
    try:
        datetime.date(int(year), int(month), int(day))
    except ValueError:
        return None
    return f"{year}{month}{day}"


def _time(text: str) -> str | None:
    match = _TIME.fullmatch(text)
    if match is None or int(match[1]) > 23:
        return None
    # the leap second of PS3.5 is none that Python knows
    seconds = "59" if match[3] == "60" else match[3] or ""
    return f"{match[1]}{match[2] or ''}{seconds}" + (f".{match[4]}" if match[4] else "")


def _date_time(text: str) -> str | None:
    if _DATE_TIME.fullmatch(text) is None:
        return None
    digits = re.split(r"[.+-]", text)[0]
    if len(digits) % 2 or (len(digits) >= 8 and _date(digits[:8]) is None):
        return None
    if len(digits) == 6 and not 1 <= int(digits[4:]) <= 12:
        return None
    return text if len(digits) <= 8 or _time(digits[8:]) == digits[8:] else None


def _age(text: str) -> str | None:
    match = _AGE.fullmatch(text.upper())
    return None if match is None else f"{int(match[1]):03d}{match[2]}"


def _number(text: str) -> float | None:
    text = text.strip("\0 ")
    if text.count(",") == 1 and "." not in text:
        text = text.replace(",", ".")
    try:
        number = float(text) if "_" not in text else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _decimal(text: str) -> str | None:
    number = _number(text)
    if number is None:
        return None
    text = text.replace(",", ".")
    return text if len(text) <= _NUMBER_CHARACTERS else f"{number:.10g}"


def _whole(text: str) -> str | None:
    number = _number(text)
    if number is None or number != int(number) or not -(2**31) <= number < 2**31:
        return None
    return text if re.fullmatch(r"[+-]?\d{1,11}", text) else str(int(number))


def _code(text: str) -> str | None:
    code = text.upper()
    return code if re.fullmatch(r"[A-Z0-9 _]{1,16}", code) else None


def _uid(text: str) -> str | None:
    return text if len(text) <= 64 and _UID.fullmatch(text) else None


_MENDERS: Mapping[str, Callable[[str], str | None]] = {
    "AS": _age,
    "CS": _code,
    "DA": _date,
    "DS": _decimal,
    "DT": _date_time,
    "IS": _whole,
    "TM": _time,
    "UI": _uid,
}
_NAMES = {
    "AS": "no age",
    "CS": "no code of 16 capital letters, digits and _",
    "DA": "no date",
    "DS": "no number",
    "DT": "no date and time",
    "IS": "no whole number",
    "TM": "no time of day",
    "UI": "no UID",
}
