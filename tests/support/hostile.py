r"""Text that would control a terminal, and a pattern that finds any such character left in an output."""

import re

HOSTILE = "a\x1b]0;title\x07b\x1b[2Jc\x1b]8;;http://evil\x1b\\d\re\u202ef\x9b2Jg\x9dh\u2066i\x7f"
"""The window's title, a cleared screen, a link, an overwritten line, a reversed one, and C1 controls."""
SHOWN = r"a\x1b]0;title\x07b\x1b[2Jc\x1b]8;;http://evil\x1b\d\re\u202ef\x9b2Jg\x9dh\u2066i\x7f"
"""The same as it is shown."""
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
