"""The header of an `xl save` file, which is also the head of a migration stream.

    XL_FILE ::= magic[32] byteorder mandatory_flags optional_flags optional_data_len
                { config_len config[config_len] ... } LIBXL_STREAM

Native byte order (little-endian on x86). The optional data are one u32 length and the domain's
configuration, a JSON text that xl ends with a NUL and counts that NUL; what follows it inside
the optional data is ignored. There is no padding, so the stream behind is rarely aligned.
reference: tools/xl/xl.h (struct save_file_header), xl_saverestore.c, xl_vmcontrol.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, NoReturn

from xsave.image.record import Layout, blob, layout, rest, u32

MAGIC = b"Xen saved domain, xl format\n \x00 \r"
BYTEORDER = 0x01020304
FLAG_JSON = 1 << 0
FLAG_STREAM_V2 = 1 << 1
KNOWN_FLAGS = FLAG_JSON | FLAG_STREAM_V2
#: Bytes in front of the optional data.
FIXED_SIZE = 48
#: Where in the file the configuration's text begins.
CONFIG_OFFSET = FIXED_SIZE + 4
#: A configuration longer than this is no configuration.
MAX_OPTIONAL_DATA = 16 << 20

_CONFIG_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class XlHeader(Layout):
    """The xl header with its optional data; `config` is the JSON text within."""

    NAME = "xl header"
    LAYOUT = layout(
        magic=blob(32),
        byteorder=u32,
        mandatory_flags=u32,
        optional_flags=u32,
        optional_data_len=u32,
        optional_data=rest,
    )

    byteorder: int
    mandatory_flags: int
    optional_flags: int
    optional_data: bytes

    @classmethod
    def for_config(cls, config: bytes) -> XlHeader:
        """Return the header that xl writes for a JSON configuration (given without NUL)."""
        text = config + b"\0"
        return cls(BYTEORDER, KNOWN_FLAGS, 0, _CONFIG_LENGTH.pack(len(text)) + text)

    @classmethod
    def optional_size(cls, fixed: bytes | memoryview, offset: int) -> int:
        """Return how many bytes follow these FIXED_SIZE ones; refuse what `check` refuses."""
        fields = super().parse(fixed, offset)
        length: int = fields["optional_data_len"]
        if fields["magic"] != MAGIC:
            cls.refuse(offset, "wrong magic", MAGIC, fields["magic"])
        cls(fields["byteorder"], fields["mandatory_flags"], 0, b"").check(offset)
        if length > MAX_OPTIONAL_DATA:
            cls._refuse_length(offset + 44, f"at most {MAX_OPTIONAL_DATA}", length)
        return length

    @classmethod
    def parse(cls, data: bytes | memoryview, offset: int) -> dict[str, Any]:
        """Return the fields; the lengths must agree with each other."""
        fields = super().parse(data, offset)
        del fields["magic"]
        length, found = fields.pop("optional_data_len"), len(fields["optional_data"])
        if length != found:
            cls._refuse_length(offset + 44, str(length), found)
        return fields

    @property
    def magic(self) -> bytes:
        """The first 32 bytes."""
        return MAGIC

    @property
    def optional_data_len(self) -> int:
        """Bytes of the optional data."""
        return len(self.optional_data)

    @property
    def config(self) -> bytes:
        """The configuration without its final NUL; empty if there is none."""
        if len(self.optional_data) < 4:
            return b""
        (length,) = _CONFIG_LENGTH.unpack_from(self.optional_data)
        return self.optional_data[4 : 4 + length].removesuffix(b"\0")

    def check(self, offset: int) -> None:
        """Refuse what xl refuses, and legacy images, which are not read yet."""
        if self.byteorder != BYTEORDER:
            self.refuse(offset + 32, "wrong byte order", f"{BYTEORDER:#x}", f"{self.byteorder:#x}")
        if unknown := self.mandatory_flags & ~KNOWN_FLAGS:
            self.refuse(offset + 36, "unknown mandatory flags", found=f"{unknown:#x}")
        if not self.mandatory_flags & FLAG_STREAM_V2:
            self.refuse(offset + 36, "a legacy image (Xen 4.5 or older), which is not read yet")
        data = self.optional_data
        if data and len(data) < 4:
            self._refuse_length(offset + 44, "at least 4", len(data))
        if data and (length := _CONFIG_LENGTH.unpack_from(data)[0]) > len(data) - 4:
            self._refuse_length(offset + FIXED_SIZE, f"at most {len(data) - 4}", length)

    @classmethod
    def _refuse_length(cls, offset: int, expected: str, found: int) -> NoReturn:
        cls.refuse(offset, "wrong configuration length", f"{expected} bytes", f"{found} bytes")
