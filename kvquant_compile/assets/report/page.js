(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  document.querySelector("#theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  for (const tabs of all(".tabs")) {
    const buttons = all("button", tabs);
    const choose = (chosen) => {
      for (const button of buttons) {
        button.setAttribute("aria-selected", button === chosen);
        document.getElementById(button.getAttribute("aria-controls")).hidden = button !== chosen;
      }
    };
    for (const button of buttons) button.addEventListener("click", () => choose(button));
  }

  const told = document.querySelector(".told");
  const graphs = document.querySelector("#graphs");
  const names = (node) => new Set(node.dataset.names.split(" "));
  const clear = () => {
    if (!graphs) return;
    graphs.classList.remove("focus");
    for (const hot of all(".hot", graphs)) hot.classList.remove("hot");
  };
  // A node, what it is on the other side (by box or by name), and the edges at either.
  const focus = (node) => {
    clear();
    const own = names(node);
    const pair = node.closest(".pair");
    for (const other of all(".node", pair)) {
      const same = other.dataset.key === node.dataset.key || [...names(other)].some((n) => own.has(n));
      if (!same) continue;
      other.classList.add("hot");
      for (const edge of all(".edge", other.closest("svg"))) {
        if ([edge.dataset.from, edge.dataset.to].includes(other.dataset.key)) edge.classList.add("hot");
      }
    }
    graphs.classList.add("focus");
    told.textContent = node.querySelector("title").textContent;
  };
  for (const node of all("#graphs .node")) {
    node.addEventListener("mouseenter", () => focus(node));
    node.addEventListener("mouseleave", () => { clear(); press(pressed); });
    node.closest("a").addEventListener("focus", () => focus(node));
    node.addEventListener("click", () => {
      for (const listing of all(".listing-of")) listing.open = true;
    });
  }

  let pressed = null;
  const press = (button) => {
    clear();
    for (const other of all(".legend button")) other.setAttribute("aria-pressed", other === button);
    pressed = button;
    if (!button) return;
    for (const part of all(`.${button.dataset.role}`, graphs)) part.classList.add("hot");
    graphs.classList.add("focus");
    told.textContent = button.title;
  };
  for (const button of all(".legend button")) {
    button.addEventListener("click", () => press(pressed === button ? null : button));
  }

  const reveal = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    if (target) target.scrollIntoView({ block: target.matches(".line") ? "center" : "start" });
  };
  addEventListener("hashchange", reveal);
  reveal();
})();
