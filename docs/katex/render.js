// Typesets the formulas that Markdown leaves as \( … \) and \[ … \].
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const displayMode = element.tagName === "DIV";
    katex.render(element.textContent.trim().slice(2, -2), element, { displayMode });
  }
});
