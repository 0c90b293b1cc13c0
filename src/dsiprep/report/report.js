// The interactive plot of q-space. The page is complete without it.
"use strict";
for (const holder of document.querySelectorAll(".qspace")) {
  const samples = JSON.parse(holder.dataset.samples);
  const size = 460;
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 2 * size;
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "q-space samples in three dimensions; turn with the mouse or the arrow keys");
  const tools = document.createElement("p");
  const label = document.createElement("p");
  label.className = "hint";
  label.setAttribute("role", "status");
  const context = canvas.getContext("2d");
  let azimuth = 0.45, elevation = 0.4, byError = true, withBefore = true, near = -1, drawn = [];
  const largest = Math.max(...samples.map((s) => s[6]), 1);
  const worst = Math.max(...samples.map((s) => s[7] ?? 0), 0.05);
  // The ends of both scales are visible on light and on dark paper.
  const colour = (share) => `hsl(${Math.round(225 - 205 * Math.min(Math.max(share, 0), 1))} 72% 52%)`;

  const project = (x, y, z) => {
    const [ca, sa, ce, se] = [Math.cos(azimuth), Math.sin(azimuth), Math.cos(elevation), Math.sin(elevation)];
    const u = ca * x - sa * y, away = sa * x + ca * y;
    return [size + u * 0.78 * size, size - (ce * z + se * away) * 0.78 * size, se * z - ce * away];
  };
  const draw = () => {
    const style = getComputedStyle(document.body);
    context.clearRect(0, 0, 2 * size, 2 * size);
    context.lineWidth = 2;
    context.font = "600 26px system-ui, sans-serif";
    context.textAlign = "center";
    [["R", 1, 0, 0, "#e5484d"], ["A", 0, 1, 0, "#2f9e5b"], ["S", 0, 0, 1, "#3f7fdb"]].forEach(([name, x, y, z, ink]) => {
      const tip = project(1.12 * x, 1.12 * y, 1.12 * z), tail = project(-1.12 * x, -1.12 * y, -1.12 * z);
      context.strokeStyle = context.fillStyle = ink;
      context.beginPath(); context.moveTo(tail[0], tail[1]); context.lineTo(tip[0], tip[1]); context.stroke();
      context.fillText(name, ...project(1.2 * x, 1.2 * y, 1.2 * z).slice(0, 2));
    });
    drawn = samples.map((s, index) => ({ s, index, at: project(s[3], s[4], s[5]) })).sort((a, b) => a.at[2] - b.at[2]);
    for (const { s, index, at } of drawn) {
      const share = byError ? (s[7] ?? 0) / worst : s[6] / largest;
      const radius = 8 + 3 * at[2];
      if (withBefore) {
        const from = project(s[0], s[1], s[2]);
        context.strokeStyle = style.color;
        context.globalAlpha = 0.4;
        context.beginPath(); context.moveTo(from[0], from[1]); context.lineTo(at[0], at[1]); context.stroke();
        context.globalAlpha = 1;
      }
      context.fillStyle = colour(share);
      context.beginPath(); context.arc(at[0], at[1], radius, 0, 7); context.fill();
      if (s[8] > 0 || index === near) {
        context.strokeStyle = style.color;
        context.lineWidth = index === near ? 5 : 2.5;
        context.beginPath(); context.arc(at[0], at[1], radius + 5, 0, 7); context.stroke();
        context.lineWidth = 2;
      }
    }
  };
  const tell = (index) => {
    const s = samples[index];
    label.textContent = s ? `Volume ${index}: b ${s[6]} s/mm²` + (s[7] === null ? "" : `, 1 - R² ${s[7]}`) +
      (s[8] > 0 ? `, ${(100 * s[8]).toFixed(0)} % of the slices lost` : "") : "Drag to turn; arrow keys turn as well.";
  };
  const button = (text, pressed, action) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.setAttribute("aria-pressed", String(pressed));
    made.addEventListener("click", () => { made.setAttribute("aria-pressed", String(action())); draw(); });
    tools.append(made, " ");
  };
  button("Colour by error", true, () => (byError = !byError));
  button("Lines to the position as acquired", true, () => (withBefore = !withBefore));
  canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    if (event.buttons) {
      azimuth -= event.movementX / 150;
      elevation = Math.min(1.57, Math.max(-1.57, elevation + event.movementY / 150));
    } else {
      const box = canvas.getBoundingClientRect(), scale = (2 * size) / box.width;
      const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
      const hit = drawn.filter(({ at }) => Math.hypot(at[0] - x, at[1] - y) < 16).at(-1);
      near = hit ? hit.index : -1;
      tell(near);
    }
    draw();
  });
  canvas.addEventListener("keydown", (event) => {
    const turn = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!turn) return;
    event.preventDefault();
    azimuth += turn[0] * 0.1;
    elevation = Math.min(1.57, Math.max(-1.57, elevation + turn[1] * 0.1));
    draw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  holder.append(tools, canvas, label);
  holder.hidden = false;
  tell(-1);
  draw();
}
