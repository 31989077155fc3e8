// Builds the page from the data.

const runs = data.runs.map((run, index) => ({
  ...run,
  color: seriesColor(index),
  dash: seriesDash(index),
  shown: true,
}));
const shown = () => runs.filter((run) => run.shown);

const title = runs.length === 1 ? runs[0].name : runs.map((run) => run.name).join(", ");
document.title = `${title} – AR-OPD report`;
document.getElementById("title").textContent = title;

const sections = [
  methodsSection(runs),
  readerSection(runs),
  validationSection(runs, shown),
  answersSection(runs),
  curvesSection(runs, shown),
  driftSection(runs, shown),
  accuracySection(runs, shown),
  diagnosisSection(runs),
  timeSection(shown, runs),
].filter(Boolean);
document
  .getElementById("content")
  .append(...sections, h("footer", {}, `aropd ${data.version}, ${data.created}`));
document
  .getElementById("contents")
  .append(
    ...sections.map((node) =>
      h("a", { href: `#${node.id}` }, node.querySelector("h2").textContent),
    ),
  );

if (runs.length > 1) {
  document.getElementById("runs").append(
    ...runs.map((run) => {
      const box = h("input", {
        type: "checkbox",
        checked: true,
        onchange: () => {
          run.shown = box.checked;
          sections.forEach((node) => node.refresh?.());
        },
      });
      return h("label", { class: "run" }, box, key(run.color, run.dash), run.name);
    }),
  );
} else document.getElementById("runs-bar").remove();
