"use strict";
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const toggle = document.getElementById("theme");
  const picker = document.getElementById("rank");
  const whole = document.getElementById("whole");
  let charts = [];
  let chosen = data.lead;
  let zoom = null;

  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const colour = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
  const number = (value, unit) =>
    value == null ? "–" : value.toLocaleString("en", { maximumSignificantDigits: 4 }) + (unit ? " " + unit : "");
  const clock = (t) => new Date(t * 1000).toISOString().replace("T", " ").slice(0, 19) + " UTC";
  const narrow = () => innerWidth < 640;

  // Some browsers refuse storage to pages that are opened from a file: the choice then lasts as long as the page.
  const remember = (value) => { try { localStorage.setItem("robustloader-theme", value); } catch { /* not kept */ } };
  const remembered = () => { try { return localStorage.getItem("robustloader-theme"); } catch { return null; } };

  // Times are UTC, as in the tables; where ticks are days apart, the day is enough.
  const ticks = (_, times, __, ___, step) => times.map((t, i) => {
    const [day, hour] = [new Date(t * 1e3).toISOString().slice(0, 10), new Date(t * 1e3).toISOString().slice(11, step < 60 ? 19 : 16)];
    const newDay = !i || new Date(times[i - 1] * 1e3).toISOString().slice(0, 10) !== day;
    return step >= 86400 ? day : newDay ? hour + "\n" + day : hour;
  });

  const axis = (extra) => ({
    stroke: colour("quiet"), grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false },
    font: "12px system-ui, sans-serif", ...extra,
  });

  const options = (host, height, series, extra = {}) => ({
    width: host.clientWidth, height, series, tzDate: (t) => uPlot.tzDate(new Date(t * 1e3), "Etc/UTC"),
    padding: [10, 10, 0, 0],
    cursor: { sync: { key: "run" }, points: { size: 6 }, drag: { x: true, y: false }, y: false },
    legend: { show: true, live: true },
    axes: [axis({ space: narrow() ? 76 : 100, values: ticks }), axis({ size: narrow() ? 46 : 62, values: (_, values) => values.map((v) => v.toLocaleString("en")), ...extra.yAxis })],
    scales: { x: { time: true }, y: { range: (_, low, high) => [0, high > 0 ? high * 1.08 : 1], ...extra.yScale } },
    hooks: {
      ...extra.hooks,
      setScale: [(chart, key) => {
        if (key === "x" && chart.ready && !following) follow(chart.scales.x.min, chart.scales.x.max);
      }],
      ready: [(chart) => { chart.ready = true; }],
    },
  });

  // One zoom for all charts.
  let following = false;
  const follow = (min, max) => {
    const times = data.ranks[chosen].end;
    zoom = min <= times[0] && max >= times[times.length - 1] ? null : { min, max };
    following = true;
    for (const chart of charts) if (chart.scales.x.min !== min || chart.scales.x.max !== max) chart.setScale("x", { min, max });
    // uPlot applies a scale in a microtask; only what the reader does after that is another zoom.
    setTimeout(() => { following = false; });
    whole.hidden = zoom === null;
  };

  const time = { label: "Time", value: (_, t) => (t == null ? "–" : clock(t)) };
  const line = (label, name, unit, extra = {}) => ({
    label, stroke: colour(name), width: 2, value: (_, v) => number(v, unit), points: { show: false }, ...extra,
  });
  const alpha = (name, percent) => `color-mix(in srgb, ${colour(name)} ${percent}%, ${colour("card")})`;
  const lonely = (columns) => columns[0].length < 3 ? { points: { show: true, size: 6 } } : {};

  const draw = {
    rate(host, rank) {
      const columns = [rank.end, rank.rate];
      return new uPlot(options(host, 220, [time, line("Samples per second", "step", "", { fill: alpha("step", 12), ...lonely(columns) })]), columns, host);
    },
    loop(host, rank) {
      const both = rank.step.map((step, i) => (step == null || rank.wait[i] == null ? null : step + rank.wait[i]));
      const series = [
        time,
        line("Waiting", "wait", "ms", { fill: alpha("wait", 45), value: (_, v, s, i) => number(i == null ? null : rank.wait[i], "ms") }),
        line("Computing", "step", "ms", { fill: alpha("step", 40) }),
      ];
      return new uPlot(options(host, 220, series), [rank.end, both, rank.step], host);
    },
    pool(host, rank) {
      const columns = [rank.end, rank.pool];
      const series = [time, line("Workers", "step", "", { paths: uPlot.paths.stepped({ align: -1 }), fill: alpha("step", 12), ...lonely(columns) })];
      return new uPlot(options(host, 150, series, { yAxis: { incrs: [1, 2, 4, 5, 10, 20, 50, 100], space: 22 } }), columns, host);
    },
    memory(host, rank) {
      if (rank.memory.every((v) => v == null)) return null;
      const columns = [rank.end, rank.memoryAll, rank.memory];
      const series = [time, line("All workers", "quiet", "MiB", { dash: [6, 4], ...lonely(columns) }), line("Largest worker", "step", "MiB", { ...lonely(columns) })];
      return new uPlot(options(host, 190, series), columns, host);
    },
    lanes(host, rank) {
      const count = rank.lanes.length;
      if (!count) return null;
      const lane = new Map(rank.lanes.map((entry, i) => [entry.id, i]));
      const row = count > 12 ? 16 : 26;
      const paint = (chart) => {
        const { ctx, bbox } = chart;
        const pixel = devicePixelRatio, tall = bbox.height / count;
        ctx.save();
        ctx.beginPath(); ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height); ctx.clip();
        rank.lanes.forEach((entry, i) => {
          const top = bbox.top + i * tall;
          ctx.fillStyle = colour("grid"); ctx.fillRect(bbox.left, top + 2 * pixel, bbox.width, tall - 4 * pixel);
          entry.busy.forEach((busy, k) => {
            if (busy == null) return;
            const left = Math.floor(chart.valToPos(rank.begin[k], "x", true)), right = Math.ceil(chart.valToPos(rank.end[k], "x", true));
            ctx.fillStyle = `rgba(${colour("lane")}, ${0.08 + 0.87 * busy / 100})`;
            ctx.clearRect(left, top + 2 * pixel, Math.max(1, right - left), tall - 4 * pixel);
            ctx.fillRect(left, top + 2 * pixel, Math.max(1, right - left), tall - 4 * pixel);
          });
        });
        // A death is a diamond; the ring of the new process goes around it, since the two are often one moment.
        for (const mark of rank.marks) {
          if (!lane.has(mark.lane)) continue;
          const back = mark.what === "WorkerRestarted" || mark.what === "WorkerRecycled", size = Math.min(5.5 * pixel, tall / 4);
          const x = chart.valToPos(mark.t, "x", true), y = bbox.top + (lane.get(mark.lane) + 0.5) * tall;
          ctx.fillStyle = colour("bad"); ctx.strokeStyle = back ? colour("ink") : colour("card"); ctx.lineWidth = 1.75 * pixel;
          ctx.beginPath();
          if (back) ctx.arc(x, y, size * 1.6, 0, 7);
          else { ctx.moveTo(x, y - size); ctx.lineTo(x + size, y); ctx.lineTo(x, y + size); ctx.lineTo(x - size, y); ctx.closePath(); ctx.fill(); }
          ctx.stroke();
        }
        ctx.restore();
      };
      const tip = document.createElement("p");
      tip.className = "tip";
      const rest = "◆ died or hung   ○ started again" + (rank.marksHidden ? `   (${number(rank.marksHidden)} older marks are left out)` : "");
      tip.textContent = rest;
      const tell = (chart) => {
        const { left, top, idx } = chart.cursor;
        const i = Math.floor(top / (chart.bbox.height / devicePixelRatio / count));
        if (left < 0 || idx == null || !rank.lanes[i]) { tip.textContent = rest; return; }
        const near = rank.marks.filter((m) => m.lane === rank.lanes[i].id && Math.abs(chart.valToPos(m.t, "x") - left) < 7).pop();
        const busy = rank.lanes[i].busy[idx];
        tip.textContent = near ? `${clock(near.t)}: ${near.text}` : `${rank.lanes[i].name}, ${busy == null ? "no reading" : "loading " + busy + " % of the time"}, ${clock(rank.end[idx])}`;
      };
      const base = options(host, row * count + 44, [time, { label: "", show: true, stroke: "transparent", points: { show: false } }], {
        yAxis: {
          splits: () => rank.lanes.map((_, i) => i + 0.5),
          values: () => rank.lanes.map((entry, i) => (count > 16 && i % 2 ? "" : entry.id === -1 ? "main" : "w" + entry.id)),
          grid: { show: false },
        },
        yScale: { auto: false, range: () => [0, count], dir: -1 },
        hooks: { draw: [paint], setCursor: [tell] },
      });
      base.legend = { show: false };
      base.cursor.points = { show: false };
      const chart = new uPlot(base, [rank.end, rank.end.map(() => 0)], host);
      host.append(tip);
      return chart;
    },
  };

  const describe = {
    rate: (rank) => `Throughput of rank ${rank.name}: ${range(rank.rate, "samples per second")}`,
    loop: (rank) => `Per batch: waiting ${range(rank.wait, "milliseconds")}; computing ${range(rank.step, "milliseconds")}`,
    pool: (rank) => `Worker processes: ${range(rank.pool, "")}`,
    memory: (rank) => `Memory of the largest worker: ${range(rank.memory, "MiB")}`,
    lanes: (rank) => `${rank.lanes.length} workers, ${rank.marks.filter((m) => /Crashed|Hung/.test(m.what)).length} deaths and ${rank.marks.filter((m) => m.what === "WorkerRestarted").length} restarts`,
  };
  const range = (values, unit) => {
    const known = values.filter((v) => v != null);
    if (!known.length) return "no data";
    const low = known.reduce((a, b) => Math.min(a, b)), high = known.reduce((a, b) => Math.max(a, b));
    return `from ${number(low)} to ${number(high)} ${unit}`.trim();
  };

  const show = () => {
    charts.forEach((chart) => chart.destroy());
    charts = [];
    const kept = zoom;
    zoom = null;
    const rank = data.ranks[chosen];
    document.querySelectorAll("[data-rank]").forEach((part) => { part.hidden = Number(part.dataset.rank) !== chosen; });
    if (!rank) return;
    document.querySelectorAll("[data-chart]").forEach((figure) => {
      const host = figure.querySelector(".plot"), key = figure.dataset.chart;
      host.replaceChildren();
      host.removeAttribute("aria-labelledby");
      host.setAttribute("aria-label", rank.end.length ? describe[key](rank) : "No data yet");
      const chart = rank.end.length ? draw[key](host, rank) : null;
      if (chart) charts.push(chart);
      else {
        const note = document.createElement("p");
        note.className = "nothing"; note.textContent = rank.end.length ? "Not measured." : "No data yet.";
        host.append(note);
      }
    });
    if (kept) follow(kept.min, kept.max);
    else whole.hidden = true;
    root.dataset.ready = String(charts.length);
  };

  const theme = () => {
    toggle.textContent = isDark() ? "Light theme" : "Dark theme";
    show();
  };
  const before = new URLSearchParams(location.hash.slice(1)).get("theme") || remembered();
  if (before === "dark" || before === "light") root.dataset.theme = before;
  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember(root.dataset.theme);
    theme();
  });
  dark.addEventListener("change", theme);
  picker?.addEventListener("change", () => { chosen = Number(picker.value); zoom = null; show(); });
  whole?.addEventListener("click", () => { zoom = null; show(); document.getElementById("h-time").scrollIntoView({ block: "nearest" }); });
  let pending = 0, width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    cancelAnimationFrame(pending);
    pending = requestAnimationFrame(show);
  });
  theme();
})();
