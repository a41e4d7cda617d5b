// Follows the pointer and the slider over a chart: moves its cursor and says what is alive there.
"use strict";
(() => {
  const show = (figure, index) => {
    const texts = JSON.parse(figure.dataset.texts);
    const at = Math.max(0, Math.min(texts.length - 1, index));
    const slider = figure.querySelector("input"), cursor = figure.querySelector(".cursor");
    const left = Number(figure.dataset.left), width = Number(figure.dataset.width);
    slider.value = at;
    slider.setAttribute("aria-valuetext", texts[at]);
    cursor.setAttribute("transform", `translate(${left + (at + 0.5) * width / texts.length} 0)`);
    figure.querySelector("output").textContent = texts[at];
  };
  const pointed = (event) => {
    const svg = event.target.closest?.("figure[data-texts] svg");
    if (!svg) return;
    const figure = svg.closest("figure"), box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width - Number(figure.dataset.left);
    const { max } = figure.querySelector("input");
    show(figure, Math.floor(x / Number(figure.dataset.width) * (Number(max) + 1)));
  };
  document.addEventListener("pointermove", pointed);
  document.addEventListener("pointerdown", pointed);
  document.addEventListener("input", (event) => {
    const figure = event.target.closest?.("figure[data-texts]");
    if (figure) show(figure, Number(event.target.value));
  });
})();
