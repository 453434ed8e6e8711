"use strict";

// Table: a filter for failed claims.
const table = document.getElementById("verdicts");
document.getElementById("only-failed").addEventListener("change", (event) => {
  table.classList.toggle("only-failed", event.target.checked);
});

// Plots: measurements in colours, predictions dashed in the colour of the text.
const COLOURS = ["#2f86a6", "#d1603d", "#5f9440", "#9a6cb4", "#b98a14", "#6478d6", "#c4598f", "#7d8288"];
const DASHES = ["dash", "dot", "dashdot", "longdash"];

function traces(panel, ink) {
  const names = (condition) => [...new Set(panel.curves.filter(condition).map((curve) => curve.group || curve.name))];
  const groups = names((curve) => curve.kind !== "prediction");
  const predictions = names((curve) => curve.kind === "prediction");
  const seen = new Set();
  return panel.curves.map((curve) => {
    const group = curve.group || curve.name;
    const predicted = curve.kind === "prediction";
    const colour = predicted ? ink : COLOURS[groups.indexOf(group) % COLOURS.length];
    const first = !seen.has(group);
    seen.add(group);
    const name = curve.group && curve.group !== curve.name ? curve.group + ", " + curve.name : curve.name;
    return {
      type: "scatter", x: curve.x, y: curve.y, name: group, legendgroup: group, showlegend: first,
      mode: curve.kind === "points" ? "markers" : "lines",
      opacity: curve.group && !predicted ? 0.6 : 1,
      marker: { color: colour, size: 7 },
      line: predicted
        ? { color: colour, width: 2, dash: DASHES[predictions.indexOf(group) % DASHES.length] }
        : { color: colour, width: curve.group ? 1 : 1.5 },
      error_y: curve.spread.length ? { array: curve.spread, color: colour, thickness: 1 } : undefined,
      hovertemplate: name + "<br>%{x:.4g}, %{y:.4g}<extra></extra>",
    };
  });
}

function layout(panel, ink, ground, line) {
  const axis = (title, log) => ({
    title: { text: title }, type: log ? "log" : "linear", exponentformat: log ? "power" : "none",
    gridcolor: line, zeroline: false, linecolor: ink, automargin: true,
  });
  const result = {
    title: { text: panel.title, font: { size: 15 } },
    xaxis: axis(panel.x_label, panel.log_x),
    yaxis: axis(panel.y_label, panel.log_y),
    paper_bgcolor: ground, plot_bgcolor: ground, font: { color: ink, family: "system-ui, sans-serif", size: 13 },
    margin: { l: 50, r: 10, t: 50, b: 110 }, hovermode: "closest",
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom" },
  };
  if (panel.ticks.length) {
    Object.assign(result.xaxis, { tickvals: panel.ticks.map((tick) => tick[0]), ticktext: panel.ticks.map((tick) => tick[1]) });
  }
  if (panel.equal) Object.assign(result.yaxis, { scaleanchor: "x", scaleratio: 1 });
  return result;
}

function draw() {
  const style = getComputedStyle(document.documentElement);
  const [ink, ground, line] = ["--text", "--ground", "--line"].map((name) => style.getPropertyValue(name).trim());
  document.querySelectorAll(".panel").forEach((element) => {
    const panel = data[element.dataset.figure][Number(element.dataset.panel)];
    const options = { responsive: true, displaylogo: false };
    Plotly.react(element, traces(panel, ink), layout(panel, ink, ground, line), options);
  });
}

const data = JSON.parse(document.getElementById("data").textContent);
if (window.Plotly) {
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
