// The words of the help dialogs.

import { el } from "./dom.js";

/** For somebody who has never heard of experts. */
export function LANES() {
  return el("div.help", {},
    el("p", {}, "This model is made of layers. In each layer many small networks, the experts, stand side by side, and for each token (a "
      + "word or a piece of one) a router picks a few of them. The rest of the layer rests."),
    el("p", {}, "The strip under a word shows that choice. Each column is a layer, from the first on the left to the last on the right. "
      + "Each colour is an expert (or, where the model has been analysed, what the expert is good at). The taller a piece, the "
      + "larger the expert's weight, which is called its gate."),
    el("p", {}, "Point at a word to read its experts by number in the panel; click to hold it there. Click an expert to switch it off or "
      + "to force it: the answer is made again beside the first, and what differs is underlined."),
    el("p", {}, "Shared experts work for every token. Their share says how much of the layer's output is theirs."));
}

export function HELP() {
  const key = (keys, text) => el("tr", {}, el("th", { scope: "row" }, el("kbd", {}, keys)), el("td", {}, text));
  return el("div.help", {},
    el("h3", {}, "Keys"),
    el("table", {}, el("tbody", {},
      key("Enter", "send; Shift and Enter begin a new line"),
      key("Escape", "stop the answer; close what is open"),
      key("Arrow up", "in an empty message box: edit your last message"),
      key("Arrow keys", "in an answer of the expert view: from token to token, up and down by ten; Home and End"),
      key("Enter", "on a token: hold it in the panel"))),
    el("h3", {}, "Versions"),
    el("p", {}, "Editing a message or retrying an answer loses nothing: < 2/3 > above it goes between the versions, each with all that followed it."),
    el("h3", {}, "What is kept where"),
    el("p", {}, "Conversations stay in this browser; Export writes one as JSON. A key, if the server wants one, is kept until the tab is "
      + "closed. The page speaks to this server and to nobody else."),
    el("h3", {}, "The lanes"), LANES());
}
