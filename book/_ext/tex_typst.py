"""A formula in TeX as Typst writes it, by recursive descent. A command without a rule is a ValueError, never left out.

Symbols are written as Unicode characters, since Typst's names of them change between versions.
"""

import re

SYMBOLS = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "varepsilon": "ε", "lambda": "λ", "mu": "μ", "pi": "π",
    "rho": "ρ", "sigma": "σ", "Sigma": "Σ", "partial": "∂", "cdot": "⋅", "times": "×", "otimes": "⊗", "odot": "⊙",
    "oplus": "⊕", "cup": "∪", "sum": "∑", "in": "∈", "to": "→", "le": "≤", "ge": "≥", "gg": "≫", "approx": "≈",
    "mid": "∣", "Rightarrow": "⇒", "iff": "⟺", "dots": "…", "langle": "⟨", "rangle": "⟩", "{": "\\{", "}": "\\}",
}  # fmt: skip
SPACES = {",": "thin", ";": "thick", " ": "med", "quad": "quad", "qquad": "wide", "!": "#h(-0.16em)"}
FENCES = {"lVert": 'class("opening", ‖)', "rVert": 'class("closing", ‖)'}
SAME = {name: name for name in ("ln", "log", "exp", "max", "min")}
ATOMS = SYMBOLS | SPACES | FENCES | SAME
ONE_ARGUMENT = {name: name for name in ("hat", "tilde", "overline", "sqrt")} | {"mathbb": "bb", "mathbf": "bold"}
TWO_ARGUMENTS = {"frac": "frac({}, {})", "tfrac": "inline(frac({}, {}))", "binom": "binom({}, {})"}
WORDS = {"text": '"{}"', "mathrm": '"{}"', "operatorname": 'op("{}")'}
SIZES = {"big": "120%", "Big": "180%"}
DELIMITERS = {"bmatrix": "[", "pmatrix": "("}
PLAIN = {"<": "lt", ">": "gt", "~": "space", **{mark: "\\" + mark for mark in '()[]|/,;:*"#$_'}}
TOKEN = re.compile(
    r"\\(?:begin|end)\{\w+\}|\\(?:text|mathrm|operatorname)\s*\{[^{}]*\}|\\\\|\\[A-Za-z]+|\\.|\d[\d.]*\d|\s+|.", re.S
)


def tex_to_typst(tex: str) -> str:
    """Raises a ValueError that names the first command without a rule, or the brace that is missing."""
    return Parser(tex).read_until()


class Parser:
    """Its tokens are those still to be read."""

    def __init__(self, tex: str):
        self.tokens = [match[0] for match in TOKEN.finditer(tex) if not match[0].isspace()]

    def peek(self) -> str:
        return self.tokens[0] if self.tokens else ""

    def take(self) -> str:
        if not self.tokens:
            raise ValueError("the formula ends too early")
        return self.tokens.pop(0)

    def read_until(self, *ends: str) -> str:
        """Everything before the first of `ends`, or before the formula's end where none is given."""
        items = []
        while self.tokens and not (ends and self.peek().startswith(ends)):
            items.append(self.read_scripts(self.read_atom()))
        if ends and not self.tokens:
            raise ValueError(f"no {ends[0]} before the formula's end")
        text = " ".join(filter(None, items))
        return re.sub(r'" (?=\\[(]|lr\()', '"', text)  # a name and its bracket, as in op("SRU")(x)

    def read_scripts(self, item: str) -> str:
        while self.peek() in ("_", "^", "'"):
            mark = self.take()
            item = (item or "zws") + ("'" if mark == "'" else f"{mark}({self.read_argument()})")
        return item

    def read_argument(self) -> str:
        """One token or group, as TeX takes it: of a number the first digit only."""
        if re.match(r"\d\d", self.peek()):
            self.tokens[:1] = [*self.peek()]
        return self.read_atom()

    def read_atom(self) -> str:
        token = self.take()
        if token == "{":
            inner = self.read_until("}")
            self.take()
            return inner
        if not token.startswith("\\"):
            return PLAIN.get(token, token)
        return self.read_command(token)

    def read_command(self, token: str) -> str:
        name, _, words = token[1:].rstrip("}").partition("{")
        name = name.strip()
        if name in WORDS:
            return WORDS[name].format(words)
        if name in ATOMS:
            return ATOMS[name]
        if name in ONE_ARGUMENT:
            return f"{ONE_ARGUMENT[name]}({self.read_argument()})"
        if name in TWO_ARGUMENTS:
            return TWO_ARGUMENTS[name].format(self.read_argument(), self.read_argument())
        if name in SIZES:
            return f"lr(size: #{SIZES[name]}, {self.read_atom()})"
        if name == "underbrace":
            return self.read_underbrace()
        if name == "left":
            return self.read_fenced()
        if name == "begin":
            return self.read_environment(words)
        raise ValueError(f"no rule for {token}")

    def read_underbrace(self) -> str:
        parts = [self.read_atom()]
        if self.peek() == "_":
            self.take()
            parts.append(self.read_atom())
        return f"underbrace({', '.join(parts)})"

    def read_fenced(self) -> str:
        """What lies between a \\left and its \\right; a dot is no fence."""
        opening, body = self.read_atom(), self.read_until("\\right")
        self.take()
        closing = self.read_atom()
        return f"lr({opening.removeprefix('.')} {body} {closing.removeprefix('.')})"

    def read_environment(self, kind: str) -> str:
        rows = [[]]
        while not self.peek().startswith("\\end"):
            rows[-1].append(self.read_until("&", "\\\\", "\\end"))
            if self.peek() == "\\\\":
                rows.append([])
            if not self.peek().startswith("\\end"):
                self.take()
        self.take()
        if kind in ("aligned", "gathered"):
            return " \\ ".join(" & ".join(row) for row in rows)
        if kind == "cases":
            return f"cases({', '.join(' & '.join(row) for row in rows)})"
        if kind in DELIMITERS:
            return f'mat(delim: "{DELIMITERS[kind]}", {"; ".join(", ".join(row) for row in rows)})'
        raise ValueError(f"no rule for \\begin{{{kind}}}")
