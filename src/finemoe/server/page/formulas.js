// TeX as MathML, which screen readers speak. A small subset; what is not known is shown as written.

const NS = "http://www.w3.org/1998/Math/MathML";

/** "alpha α beta β" as a table. */
const pairs = (text) => Object.fromEntries([...text.matchAll(/(\S+)\s+(\S+)/g)].map(([, name, sign]) => [name, sign]));

const LETTERS = pairs(`alpha α beta β gamma γ delta δ epsilon ϵ varepsilon ε zeta ζ eta η theta θ vartheta ϑ iota ι kappa κ lambda λ
  mu μ nu ν xi ξ pi π rho ρ sigma σ tau τ upsilon υ phi ϕ varphi φ chi χ psi ψ omega ω Gamma Γ Delta Δ Theta Θ
  Lambda Λ Xi Ξ Pi Π Sigma Σ Phi Φ Psi Ψ Omega Ω infty ∞ partial ∂ nabla ∇ hbar ℏ ell ℓ emptyset ∅ Re ℜ Im ℑ
  dots … ldots … cdots ⋯ vdots ⋮`);
const OPERATORS = pairs(`cdot ⋅ times × div ÷ pm ± mp ∓ ast ∗ circ ∘ oplus ⊕ otimes ⊗ le ≤ leq ≤ ge ≥ geq ≥ ne ≠ neq ≠ ll ≪ gg ≫ approx ≈
  equiv ≡ sim ∼ simeq ≃ propto ∝ in ∈ notin ∉ ni ∋ subset ⊂ subseteq ⊆ supset ⊃ supseteq ⊇ cup ∪ cap ∩ setminus ∖
  land ∧ wedge ∧ lor ∨ vee ∨ neg ¬ lnot ¬ forall ∀ exists ∃ to → rightarrow → leftarrow ← gets ← Rightarrow ⇒
  implies ⟹ Leftarrow ⇐ iff ⟺ Leftrightarrow ⇔ leftrightarrow ↔ mapsto ↦ mid ∣ parallel ∥ perp ⊥ angle ∠ langle ⟨
  rangle ⟩ lfloor ⌊ rfloor ⌋ lceil ⌈ rceil ⌉ lVert ‖ rVert ‖ Vert ‖ lvert | rvert | vert | prime ′ top ⊤ bot ⊥
  star ⋆ dagger † bullet ∙ { { } } | ‖ % % # # & & $ $ _ _`);
const LARGE = { sum: "∑", prod: "∏", int: "∫", iint: "∬", oint: "∮", bigcup: "⋃", bigcap: "⋂", bigoplus: "⨁" };
const NAMES = ["sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln", "lg", "exp",
  "det", "dim", "ker", "deg", "gcd", "arg", "Pr"];
const LIMITS = ["lim", "max", "min", "sup", "inf", "argmax", "argmin", "limsup", "liminf"];
const ACCENTS = { hat: "^", widehat: "^", bar: "¯", overline: "¯", tilde: "~", widetilde: "~", vec: "→", dot: "˙", ddot: "¨" };
const STYLES = { mathbf: "bold", boldsymbol: "bold", bm: "bold", mathrm: "normal", mathit: "italic", mathsf: "normal", operatorname: "normal" };
const SPACES = { ",": "0.17em", ":": "0.22em", ";": "0.28em", "!": "0", " ": "0.25em", quad: "1em", qquad: "2em" };
const DOUBLE = { R: "ℝ", N: "ℕ", Z: "ℤ", Q: "ℚ", C: "ℂ", E: "𝔼", P: "ℙ", 1: "𝟙" };
const FENCES = { pmatrix: "()", bmatrix: "[]", vmatrix: "||", cases: "{", matrix: "", aligned: "", align: "", "align*": "", array: "" };

const make = (tag, ...children) => {
  const node = document.createElementNS(NS, tag);
  node.append(...children);
  return node;
};
const operator = (text, stretchy = false) => {
  const node = make("mo", text);
  if (!stretchy) node.setAttribute("stretchy", "false");
  return node;
};

class Reader {
  constructor(source) {
    this.tokens = source.match(/\\[A-Za-z]+\*?|\\.|\d+(?:\.\d+)?|\s+|[^]/gu) ?? [];
    this.at = 0;
    this.depth = 0;
  }

  peek() { return this.tokens[this.at]; }

  skipSpace() { while (/^\s/.test(this.peek() ?? "")) this.at += 1; }

  /** Everything until one of `ends`, as a row. */
  row(ends = []) {
    const row = make("mrow");
    for (;;) {
      this.skipSpace();
      const next = this.peek();
      if (next === undefined || ends.includes(next)) break;
      row.append(this.scripted());
    }
    return row;
  }

  scripted() {
    let base = this.atom();
    let under = null;
    let over = null;
    const limits = base.limits === true;
    for (;;) {
      this.skipSpace();
      const next = this.peek();
      if (next === "_" && !under) { this.at += 1; under = this.argument(); }
      else if (next === "^" && !over) { this.at += 1; over = this.argument(); }
      else if (next === "'") { this.at += 1; over = make("mrow", ...(over ? [over] : []), operator("′")); }
      else break;
    }
    if (under && over) base = make(limits ? "munderover" : "msubsup", base, under, over);
    else if (under) base = make(limits ? "munder" : "msub", base, under);
    else if (over) base = make(limits ? "mover" : "msup", base, over);
    return base;
  }

  argument() {
    this.skipSpace();
    if (this.peek() === "{") return this.atom();
    const digits = this.peek();
    // x^12 is x to the 1, then 2.
    if (/^\d\d/.test(digits ?? "")) {
      this.tokens.splice(this.at, 1, ...digits);
    }
    return this.peek() === undefined ? make("mrow") : this.atom();
  }

  /** The source of a {group}, unread. */
  raw() {
    this.skipSpace();
    if (this.peek() !== "{") { this.at += 1; return this.tokens[this.at - 1] ?? ""; }
    let depth = 0;
    let text = "";
    for (; this.at < this.tokens.length; this.at += 1) {
      const token = this.tokens[this.at];
      if (token === "{" && (depth += 1) === 1) continue;
      if (token === "}" && (depth -= 1) === 0) { this.at += 1; break; }
      text += token;
    }
    return text;
  }

  atom() {
    // A formula nested deeper than anybody writes is an attack on the stack.
    if ((this.depth += 1) > 60) throw new Error("too deep");
    const node = this.read();
    this.depth -= 1;
    return node;
  }

  read() {
    const token = this.tokens[this.at];
    this.at += 1;
    if (token === undefined) return make("mrow");
    if (token === "{") {
      const row = this.row(["}"]);
      this.at += 1;
      return row;
    }
    if (token.startsWith("\\")) return this.command(token.slice(1));
    if (/^\d/.test(token)) return make("mn", token);
    if (/^\p{L}/u.test(token)) return make("mi", token);
    if (token === "-") return operator("−");
    if (token === "~" || token === "&") return make("mspace");
    return operator(token);
  }

  command(name) {
    if (Object.hasOwn(LETTERS, name)) return make("mi", LETTERS[name]);
    if (Object.hasOwn(OPERATORS, name)) return operator(OPERATORS[name]);
    if (Object.hasOwn(LARGE, name)) {
      const node = make("mo", LARGE[name]);
      node.limits = !name.includes("int");
      return node;
    }
    if (NAMES.includes(name)) return make("mi", name);
    if (LIMITS.includes(name)) {
      const node = make("mi", name);
      node.limits = true;
      return node;
    }
    if (Object.hasOwn(SPACES, name)) {
      const space = make("mspace");
      space.setAttribute("width", SPACES[name]);
      return space;
    }
    if (["frac", "dfrac", "tfrac", "cfrac"].includes(name)) return make("mfrac", this.argument(), this.argument());
    if (name === "binom") {
      const inner = make("mfrac", this.argument(), this.argument());
      inner.setAttribute("linethickness", "0");
      return make("mrow", operator("(", true), inner, operator(")", true));
    }
    if (name === "sqrt") return this.root();
    if (Object.hasOwn(ACCENTS, name)) {
      const node = make("mover", this.argument(), operator(ACCENTS[name], /^(over|wide)/.test(name)));
      node.setAttribute("accent", "true");
      return node;
    }
    if (["text", "textbf", "textit", "textrm", "mbox"].includes(name)) return make("mtext", this.raw());
    if (name === "mathbb" || name === "mathcal" || name === "mathscr") {
      const letter = this.raw();
      return make("mi", (name === "mathbb" && DOUBLE[letter]) || letter);
    }
    if (Object.hasOwn(STYLES, name)) return this.styled(name);
    if (name === "left" || name === "right" || /^[bB]igg?[lrm]?$/.test(name)) return this.fence();
    if (name === "begin") return this.table(this.raw());
    if (["displaystyle", "textstyle", "limits", "nolimits", "\\", "nonumber"].includes(name)) return make("mspace");
    return make("mtext", `\\${name}`);
  }

  root() {
    this.skipSpace();
    if (this.peek() !== "[") return make("msqrt", this.argument());
    this.at += 1;
    const index = this.row(["]"]);
    this.at += 1;
    return make("mroot", this.argument(), index);
  }

  styled(name) {
    if (name === "operatorname" || name === "mathrm" || name === "mathsf") {
      const node = make("mi", this.raw());
      node.setAttribute("mathvariant", "normal");
      return node;
    }
    const row = make("mrow", this.argument());
    if (STYLES[name] === "bold") row.setAttribute("class", "bold");
    return row;
  }

  fence() {
    this.skipSpace();
    const token = this.tokens[this.at] ?? ".";
    this.at += 1;
    const name = token.startsWith("\\") ? OPERATORS[token.slice(1)] ?? token : token;
    return name === "." ? make("mspace") : operator(name, true);
  }

  table(kind) {
    if (!Object.hasOwn(FENCES, kind)) return make("mtext", `\\begin{${kind}}`);
    if (kind === "array") this.raw();
    const table = make("mtable");
    for (;;) {
      const line = make("mtr");
      for (;;) {
        line.append(make("mtd", this.row(["&", "\\\\", "\\end"])));
        if (this.peek() !== "&") break;
        this.at += 1;
      }
      table.append(line);
      if (this.peek() !== "\\\\") break;
      this.at += 1;
    }
    if (this.peek() === "\\end") { this.at += 1; this.raw(); }
    const [open, close] = FENCES[kind];
    return make("mrow", ...(open ? [operator(open, true)] : []), table, ...(close ? [operator(close, true)] : []));
  }
}

/** A formula as a node; its source as text where it cannot be read. */
export function formula(source, block = false) {
  try {
    if (source.length > 4000) throw new Error("too long");
    const reader = new Reader(source);
    const math = make("math", reader.row());
    // A stray } would end the row early: nothing may be lost silently.
    if (reader.peek() !== undefined) throw new Error("unbalanced");
    if (block) math.setAttribute("display", "block");
    math.setAttribute("title", source);
    return math;
  } catch {
    const code = document.createElement("code");
    code.textContent = source;
    return code;
  }
}
