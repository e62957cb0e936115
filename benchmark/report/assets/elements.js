/* What both pages build their elements with: names reach the document as text only. */
(() => {
  "use strict";

  const drawn = document.getElementById("empty").namespaceURI;

  function build(node, properties, children) {
    for (const [name, value] of Object.entries(properties)) {
      if (typeof value === "function") node.addEventListener(name, value);
      else if (value !== false && value !== undefined) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== ""));
    return node;
  }
  const el = (tag, properties = {}, ...children) => build(document.createElement(tag), properties, children);
  const svg = (tag, properties = {}, ...children) => build(document.createElementNS(drawn, tag), properties, children);
  globalThis.Elements = { el, svg };
})();
