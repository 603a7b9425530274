"""Read TensorBoard's event files with protobuf, by the numbers of the fields in TensorBoard's event.proto and summary.proto."""

import struct
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]

_DOUBLE, _FLOAT, _INT64, _STRING, _MESSAGE = 1, 2, 3, 9, 11


def _event_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="events.proto", package="test", syntax="proto3")
    messages: dict[str, list[tuple[str, int, int, str]]] = {
        "Value": [("tag", 1, _STRING, ""), ("simple_value", 2, _FLOAT, "")],
        "Summary": [("value", 1, _MESSAGE, "Value")],
        "SessionLog": [("status", 1, _INT64, "")],
        "Event": [
            ("wall_time", 1, _DOUBLE, ""),
            ("step", 2, _INT64, ""),
            ("file_version", 3, _STRING, ""),
            ("summary", 5, _MESSAGE, "Summary"),
            ("session_log", 7, _MESSAGE, "SessionLog"),
        ],
    }
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for field, number, kind, type_name in fields:
            added = message.field.add(name=field, number=number, type=kind, label=3 if name == "Summary" else 1)
            if type_name:
                added.type_name = f".test.{type_name}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("test.Event"))


def read_events(path: Path) -> list[Any]:
    """The complete events of a file."""
    event, events = _event_class(), []
    content, at = path.read_bytes(), 0
    while at + 12 < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        if at + length + 16 <= len(content):
            events.append(event.FromString(content[at + 12 : at + 12 + length]))
        at += length + 16
    return events


def read_scalars(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and values of the scalars in a folder, as TensorBoard has them: it forgets steps from the start of a session on."""
    found: list[tuple[int, dict[str, float]]] = []
    for event in (event for path in sorted(folder.glob("*tfevents*")) for event in read_events(path)):
        if event.session_log.status == 1:
            found = [(step, values) for step, values in found if step < event.step]
        if event.summary.value:
            found.append((event.step, {value.tag: value.simple_value for value in event.summary.value}))
    return found
