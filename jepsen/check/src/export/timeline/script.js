"use strict";
// The timeline: draws what the page's data holds on a canvas, and tells in words whatever is pointed at.
(() => {
  const D = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const make = (tag, text, cls) => {
    const e = document.createElement(tag);
    if (text !== undefined) e.textContent = text;
    if (cls) e.className = cls;
    return e;
  };
  const KIND = ["ok", "fail", "info"];
  const WORD = ["ok", "fail", "unknown"];
  // Told apart with any kind of colour vision, on light and dark (after Okabe and Ito).
  const HUES = ["#e69f00", "#56b4e9", "#9467bd", "#c4a484", "#0072b2", "#d55e00", "#7f7f7f", "#bcbd22"];
  const ops = D.ops.map((o) => ({
    lane: o[0], t0: o[1], t1: o[2], kind: o[3], f: D.names[o[4]], i0: o[5], i1: o[6],
    node: o[7] === null ? "" : D.names[o[7]], rev: o[8], process: o[9], call: o[10], answer: o[11], error: o[12],
  }));
  const lanes = Array.from({ length: D.lanes }, () => []);
  ops.forEach((o, at) => { o.at = at; lanes[o.lane].push(o); });
  lanes.forEach((lane) => lane.forEach((o, at) => { o.next = lane[at + 1]; o.pos = at; }));
  const byEvent = new Map();
  ops.forEach((o) => { byEvent.set(o.i0, o); if (o.i1 !== null) byEvent.set(o.i1, o); });
  D.anomalies.forEach((a) => {
    a.ops = [...new Set(a.events.map((e) => byEvent.get(e)).filter(Boolean))];
    a.ops.forEach((o) => { (o.wrong = o.wrong || []).push(a); });
  });
  const wrong = ops.filter((o) => o.wrong);
  // The moment at which each operation can have taken effect if all did in the order of their revisions.
  ops.filter((o) => o.rev !== null && o.kind === 0)
    .sort((x, y) => x.rev - y.rev || (x.f === "read") - (y.f === "read") || x.t0 - y.t0)
    .reduce((latest, o) => {
      const at = Math.max(latest, o.t0);
      o.point = at <= o.t1 ? at : null;
      return o.point === null ? latest : at;
    }, 0);
  const faultNames = [...new Set(D.bands.map((b) => b.name))];
  const hue = (name) => HUES[faultNames.indexOf(name) % HUES.length];
  const replicas = [...new Set(D.leaders.map((l) => l.replica))].sort();
  const rowsOfBands = [];
  D.bands.forEach((b) => {
    let row = rowsOfBands.findIndex((end) => end <= b.from);
    if (row < 0) row = rowsOfBands.length < 6 ? rowsOfBands.push(0) - 1 : 5;
    rowsOfBands[row] = b.to;
    b.row = row;
  });

  const canvas = $("canvas"), strip = $("strip"), tip = $("tip");
  const LEFT = 62, AXIS = 26, GAP = 4;
  const BAND = 18, LEAD = 20, PHASE = 16;
  const laneHeight = D.lanes > 40 ? 16 : D.lanes > 16 ? 20 : 26;
  const top = AXIS + (D.phases.length ? PHASE : 0) + (D.leaders.length ? LEAD : 0) + rowsOfBands.length * BAND + GAP;
  const height = top + Math.max(D.lanes, 1) * laneHeight + 8;
  const end = Math.max(D.end, 1);
  let width = 0, view = { a: 0, b: end }, sel = null, hover = null, anomaly = -1, needle = "", colours = {};

  const shownFrom = ops.length ? ops[0].t0 : 0;
  const shownTo = ops.reduce((most, o) => Math.max(most, o.t1 === null ? o.t0 : o.t1), shownFrom + 1);
  const isPart = ops.length < D.total;

  const time = (ns, step) => {
    const s = ns / 1e9, digits = step === undefined ? 3 : Math.max(0, Math.min(9, Math.ceil(-Math.log10(step / 1e9) - 1e-9)));
    return s.toFixed(digits) + " s";
  };
  const took = (ns) => ns < 1e6 ? (ns / 1e3).toFixed(0) + " µs" : ns < 1e9 ? (ns / 1e6).toFixed(1) + " ms" : time(ns);
  const x = (t) => LEFT + (t - view.a) / (view.b - view.a) * (width - LEFT);
  const t = (px) => view.a + (px - LEFT) / (width - LEFT) * (view.b - view.a);
  const y = (lane) => top + lane * laneHeight;

  const parse = (words) => {
    // A value that was cut short cannot be read, and is shown as it is.
    try { return JSON.parse(words) || {}; } catch { return {}; }
  };
  const parts = (o) => o.parts ||= (() => {
    const call = parse(o.call), answer = o.answer ? parse(o.answer) : call;
    const first = (...names) => names.map((name) => answer[name] ?? call[name]).find((found) => found !== undefined);
    const value = answer.value !== undefined ? answer.value : call.value;
    const from = call.from !== undefined && o.f === "cas" ? JSON.stringify(call.from) + "→" : "";
    return {
      of: first("key", "lease", "run", "job", "device", "code", "pairing", "watcher"),
      value: value === undefined ? "" : from + JSON.stringify(value),
    };
  })();
  const label = (o) => {
    const { of, value } = parts(o);
    return [o.f, of, value && o.f === "read" ? "= " + value : value].filter((part) => part !== undefined && part !== "").join(" ");
  };
  // Where there is no room for more: `w 17`.
  const brief = (o) => (o.f[0] + " " + (parts(o).value || parts(o).of || "")).trim();

  function palette() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["paper", "card", "ink", "soft", "line", "lane", "ok", "fail", "info", "wrong", "accent",
      "ok-ink", "fail-ink", "info-ink"]) colours[name] = style.getPropertyValue("--" + name).trim();
  }

  function size(target, cssHeight) {
    const ratio = window.devicePixelRatio || 1, w = target.clientWidth;
    target.style.height = cssHeight + "px";
    target.width = Math.round(w * ratio);
    target.height = Math.round(cssHeight * ratio);
    const g = target.getContext("2d");
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    return g;
  }

  function niceStep(span, count) {
    const raw = span / count, power = 10 ** Math.floor(Math.log10(raw));
    return [1, 2, 5, 10].map((m) => m * power).find((step) => step >= raw);
  }

  function text(g, words, left, right, middle, colour, font, brief) {
    const room = right - left;
    if (room < 8) return;
    g.font = font || "12px system-ui, sans-serif";
    g.fillStyle = colour;
    g.textBaseline = "middle";
    let fit = brief && g.measureText(words).width > room ? brief : words;
    if (g.measureText(fit).width > room) {
      const most = Math.floor(fit.length * room / g.measureText(fit).width) - 1;
      if (most < 2) return;
      fit = fit.slice(0, most) + "…";
    }
    g.fillText(fit, left, middle);
  }

  // A span in one of the strips above the lanes; its words stay in sight while it is.
  function block(g, from, to, upper, tall, fill, words, ink) {
    const a = Math.max(x(from), LEFT), b = Math.min(x(to), width);
    if (b < LEFT || a > width) return;
    g.fillStyle = fill;
    g.fillRect(a, upper, Math.max(b - a - 1, 1.5), tall);
    text(g, words, a + 5, b - 4, upper + tall / 2 + .5, ink, "600 11px system-ui, sans-serif");
  }

  function draw() {
    width = canvas.clientWidth;
    const g = size(canvas, height);
    g.clearRect(0, 0, width, height);
    g.fillStyle = colours.lane;
    for (let lane = 0; lane < D.lanes; lane += 2) g.fillRect(LEFT, y(lane), width - LEFT, laneHeight);
    drawAxis(g);
    drawStrips(g);
    g.save();
    g.beginPath();
    g.rect(LEFT, 0, width - LEFT, height);
    g.clip();
    drawBars(g);
    drawAnomalies(g);
    g.restore();
    drawLabels(g);
    drawStrip();
  }

  function drawAxis(g) {
    const step = niceStep(view.b - view.a, Math.max(2, (width - LEFT) / 110));
    g.font = "11px system-ui, sans-serif";
    g.textBaseline = "middle";
    for (let at = Math.ceil(view.a / step) * step; at <= view.b; at += step) {
      const px = x(at);
      g.fillStyle = colours.line;
      g.fillRect(px, AXIS - 6, 1, height);
      g.fillStyle = colours.soft;
      if (px < width - 40) g.fillText(time(at, step), px + 4, AXIS / 2);
    }
  }

  function drawStrips(g) {
    let upper = AXIS;
    if (D.phases.length) {
      D.phases.forEach((p, at) => block(g, p.from, p.to, upper, PHASE - 3, at % 2 ? colours.lane : colours.line, p.name || "",
        colours.soft));
      upper += PHASE;
    }
    if (D.leaders.length) {
      D.leaders.forEach((l) => {
        const colour = HUES[(replicas.indexOf(l.replica) + 1) % HUES.length];
        block(g, l.from, l.to, upper, LEAD - 4, colour + "66", `${l.replica} · term ${l.term}`, colours.ink);
        const a = x(l.from);
        g.fillStyle = colour;
        if (a >= LEFT) g.fillRect(a, upper, 2.5, LEAD - 4);
      });
      upper += LEAD;
    }
    D.bands.forEach((b) => {
      const colour = hue(b.name), targets = Array.isArray(b.targets) && b.targets.length ? " → " + b.targets.join(" ") : "";
      const doubt = b.outcome && b.outcome !== "installed" ? ` (${b.outcome})` : "";
      block(g, b.from, b.to, upper + b.row * BAND, BAND - 3, colour + "88", b.name + targets + doubt, colours.ink);
      const a = Math.max(x(b.from), LEFT), e = Math.min(x(b.to), width);
      if (e < LEFT || a > width) return;
      g.fillStyle = colour + "20";
      g.fillRect(a, top - GAP, e - a, height);
      g.fillStyle = colour + "aa";
      if (x(b.from) >= LEFT) g.fillRect(a, upper + b.row * BAND, 1, height);
      if (x(b.to) <= width) g.fillRect(e - 1, upper + b.row * BAND, 1, height);
    });
    D.marks.forEach((m) => {
      const px = x(m.at);
      if (px < LEFT || px > width) return;
      g.strokeStyle = m.name === "healed" ? colours.ok : colours.soft;
      g.setLineDash([3, 3]);
      g.beginPath();
      g.moveTo(px, AXIS);
      g.lineTo(px, height);
      g.stroke();
      g.setLineDash([]);
    });
  }

  const stop = (o) => o.t1 === null ? end : o.t1;

  function bar(o) {
    const a = x(o.t0), b = Math.max(x(stop(o)), a + 3);
    return { a, b, upper: y(o.lane) + 3, tall: laneHeight - 6 };
  }

  function drawBars(g) {
    for (const lane of lanes) {
      for (const o of lane) {
        if (o.t0 > view.b) break;
        const fades = o.kind === 2 ? Math.min(o.next ? x(o.next.t0) - 2 : width + 200, x(stop(o)) + 90) : 0;
        const { a, b, upper, tall } = bar(o);
        if (Math.max(b, fades) < LEFT) continue;
        drawBar(g, o, a, b, upper, tall, fades);
      }
    }
    // Above the bars beside them.
    for (const o of wrong) {
      const { a, b, upper, tall } = bar(o);
      g.strokeStyle = colours.wrong;
      g.lineWidth = 2.5;
      g.strokeRect(a - 1, upper - 1, b - a + 2, tall + 2);
    }
    if (sel) {
      const { a, b, upper, tall } = bar(sel);
      g.strokeStyle = colours.accent;
      g.lineWidth = 2.5;
      g.strokeRect(a - 2.5, upper - 2.5, b - a + 5, tall + 5);
    }
  }

  function drawBar(g, o, a, b, upper, tall, fades) {
    const name = KIND[o.kind], colour = colours[name];
    g.globalAlpha = needle && !o.found ? .15 : 1;
    if (o.kind === 0) {
      g.fillStyle = colour;
      g.fillRect(a, upper, b - a, tall);
    } else if (o.kind === 1) {
      g.fillStyle = colour + "40";
      g.fillRect(a, upper, b - a, tall);
      g.strokeStyle = colour;
      g.lineWidth = 1.25;
      g.strokeRect(a + .6, upper + .6, Math.max(b - a - 1.2, .5), tall - 1.2);
    } else {
      const to = Math.max(fades, b);
      const fade = g.createLinearGradient(a, 0, to, 0);
      const solid = Math.min(.999, (b - a) / Math.max(to - a, 1));
      fade.addColorStop(0, colour);
      fade.addColorStop(solid, colour + "cc");
      fade.addColorStop(1, colour + "00");
      g.fillStyle = fade;
      g.fillRect(a, upper, to - a, tall);
    }
    if (tall >= 12) {
      const ink = o.kind === 1 ? colours.ink : colours[name + "-ink"];
      text(g, label(o), Math.max(a, LEFT) + 4, b - 3, upper + tall / 2 + .5, ink, "", brief(o));
    }
    if ($("points").checked && o.point != null) {
      g.fillStyle = colours.ink;
      g.beginPath();
      g.arc(x(o.point), upper + tall / 2, 2.6, 0, 7);
      g.fill();
    }
    if (o === hover) {
      g.strokeStyle = colours.ink;
      g.lineWidth = 1;
      g.strokeRect(a - .5, upper - .5, b - a + 1, tall + 1);
    }
    g.globalAlpha = 1;
  }

  function drawAnomalies(g) {
    D.anomalies.forEach((a, at) => {
      const px = x(a.time);
      if (px < LEFT - 8 || px > width + 8) return;
      g.fillStyle = g.strokeStyle = colours.wrong;
      g.lineWidth = at === anomaly ? 2 : 1;
      g.beginPath();
      g.moveTo(px, AXIS);
      g.lineTo(px, height);
      g.stroke();
      g.beginPath();
      g.moveTo(px - 6, AXIS - 9);
      g.lineTo(px + 6, AXIS - 9);
      g.lineTo(px, AXIS + 1);
      g.fill();
    });
  }

  function drawLabels(g) {
    let upper = AXIS;
    const side = (words, middle, colour) => text(g, words, 6, LEFT - 4, middle, colour || colours.soft, "11px system-ui, sans-serif");
    if (D.phases.length) { side("phase", upper + PHASE / 2 - 1); upper += PHASE; }
    if (D.leaders.length) { side("leader", upper + LEAD / 2 - 1); upper += LEAD; }
    if (rowsOfBands.length) side("faults", upper + BAND / 2 - 1);
    for (let lane = 0; lane < D.lanes; lane++) side("client " + (lane + 1), y(lane) + laneHeight / 2 + .5, colours.ink);
    g.fillStyle = colours.line;
    g.fillRect(LEFT - 1, AXIS, 1, height);
  }

  function drawStrip() {
    const tall = 56, g = size(strip, tall), w = strip.clientWidth;
    const px = (at) => at / end * w;
    g.clearRect(0, 0, w, tall);
    D.bands.forEach((b) => {
      g.fillStyle = hue(b.name) + "30";
      g.fillRect(px(b.from), 0, Math.max(px(b.to) - px(b.from), 1), tall);
    });
    const most = Math.max(1, ...D.strip.map((c) => c[0] + c[1] + c[2])), column = w / D.strip.length;
    D.strip.forEach((c, at) => {
      let floor = tall - 3;
      c.forEach((count, kind) => {
        const h = count / most * (tall - 12);
        g.fillStyle = colours[KIND[kind]];
        g.fillRect(at * column, floor - h, Math.max(column - .75, .75), h);
        floor -= h;
      });
    });
    D.anomalies.forEach((a) => {
      g.fillStyle = colours.wrong;
      g.fillRect(px(a.time) - 1, 0, 2, tall);
    });
    if (isPart) {
      g.fillStyle = colours.soft;
      g.fillRect(px(shownFrom), tall - 3, Math.max(px(shownTo) - px(shownFrom), 3), 3);
    }
    g.strokeStyle = colours.accent;
    g.lineWidth = 2;
    g.fillStyle = colours.accent + "22";
    const a = px(view.a), b = Math.max(px(view.b), a + 3);
    g.fillRect(a, 1, b - a, tall - 2);
    g.strokeRect(a, 1, b - a, tall - 2);
  }

  let asked = false;
  const redraw = () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; draw(); });
  };

  function show(a, b) {
    const least = 1e4, span = Math.min(Math.max(b - a, least), end * 1.02);
    const from = Math.min(Math.max(a, -end * .01), end * 1.01 - span);
    view = { a: from, b: from + span };
    redraw();
  }
  const zoom = (factor, px) => {
    const at = t(px === undefined ? LEFT + (width - LEFT) / 2 : Math.max(px, LEFT));
    show(at - (at - view.a) * factor, at + (view.b - at) * factor);
  };
  const pan = (part) => { const d = (view.b - view.a) * part; show(view.a + d, view.b + d); };
  const fit = () => isPart ? show(shownFrom, shownTo) : show(0, end * 1.005);

  function describe(o) {
    const where = o.node ? ` at ${o.node}` : "";
    return `${label(o)}, ${WORD[o.kind]}${where}, called ${time(o.t0)}, ` +
      (o.t1 === null ? "never ended" : `took ${took(o.t1 - o.t0)}`);
  }

  function select(o, move) {
    sel = o;
    const box = $("detail");
    box.textContent = "";
    if (!o) return redraw();
    box.append(make("strong", describe(o)));
    const list = make("dl");
    const add = (name, value, cls) => {
      if (value === null || value === undefined || value === "") return;
      list.append(make("dt", name));
      const dd = make("dd", undefined, cls);
      dd.append(name === "call" || name === "answer" ? make("code", value) : String(value));
      list.append(dd);
    };
    add("client", `${o.lane + 1} (process ${o.process})`);
    add("call", o.call);
    add("answer", o.answer);
    add("error", o.error);
    add("revision", o.rev);
    add("events", o.i1 === null ? o.i0 : `${o.i0}, ${o.i1}`);
    (o.wrong || []).forEach((a) => add(a.check, a.what, "wrong"));
    box.append(list);
    if (move) {
      const middle = (o.t0 + stop(o)) / 2, half = (view.b - view.a) / 2;
      if (o.t0 < view.a || stop(o) > view.b) show(middle - half, middle + half);
    }
    redraw();
  }

  function jump(at) {
    if (!D.anomalies.length) return;
    anomaly = (at + D.anomalies.length) % D.anomalies.length;
    const a = D.anomalies[anomaly];
    const from = Math.min(a.time, ...a.ops.map((o) => o.t0)), to = Math.max(a.time, ...a.ops.map((o) => o.t1 ?? o.t0));
    const room = Math.max((to - from) * .5, end / 2e3, 2e6);
    show(from - room, to + room);
    select(a.ops[a.ops.length - 1] || null, false);
    if (!a.ops.length) $("detail").append(make("strong", `${a.check}: ${a.what}`));
    canvas.focus({ preventScroll: true });
  }

  function hit(px, py) {
    const lane = Math.floor((py - top) / laneHeight);
    if (px < LEFT || !lanes[lane]) return null;
    let best = null, near = 5;
    for (const o of lanes[lane]) {
      const { a, b } = bar(o);
      const off = px < a ? a - px : px > b ? px - b : 0;
      if (off < near) { near = off; best = o; if (!off) break; }
    }
    return best;
  }

  function above(px, py) {
    if (px < LEFT || py > top) return null;
    const at = t(px);
    const band = D.bands.find((b) => {
      const upper = top - GAP - (rowsOfBands.length - b.row) * BAND;
      return py >= upper && py < upper + BAND && b.from <= at && at <= b.to;
    });
    if (band) {
      return [`${band.name} ${(band.targets || []).join(" ")}`, `${time(band.from)}, for ${took(band.to - band.from)}`,
        band.outcome && `${band.outcome}: ${band.why || ""}`];
    }
    const leader = D.leaders.find((l) => l.from <= at && at < l.to);
    if (leader && py > AXIS) return [`leader ${leader.replica}, term ${leader.term}`, `since ${time(leader.from)}`];
    const near = D.anomalies.find((a) => Math.abs(x(a.time) - px) < 7);
    return near && py <= AXIS + 4 ? [near.check, near.what] : null;
  }

  function tell(px, py) {
    hover = hit(px, py);
    const other = hover ? null : above(px, py);
    const mark = hover || other ? null : D.marks.find((m) => Math.abs(x(m.at) - px) < 4);
    tip.hidden = !hover && !other && !mark;
    tip.textContent = "";
    if (hover) {
      tip.append(make("b", label(hover)), ` · ${WORD[hover.kind]}${hover.node ? " · " + hover.node : ""}`, make("br"));
      tip.append(make("span", `${time(hover.t0)} + ${hover.t1 === null ? "…" : took(hover.t1 - hover.t0)}` +
        ` · process ${hover.process}` + (hover.rev === null ? "" : ` · revision ${hover.rev}`), "soft"));
      [hover.answer || hover.call, hover.error].filter(Boolean).forEach((words) => tip.append(make("br"), make("code", words)));
      (hover.wrong || []).slice(0, 3).forEach((a) => tip.append(make("br"), make("span", `${a.check}: ${a.what}`, "wrong")));
    } else if (other) {
      tip.append(make("b", other[0]));
      other.slice(1).filter(Boolean).forEach((words) => tip.append(make("br"), words));
    } else if (mark) {
      tip.append(make("b", mark.name), make("br"), `${time(mark.at)} `, make("code", mark.value));
    }
    if (!tip.hidden) {
      const left = Math.min(px + 14, width - tip.offsetWidth - 6), lower = py + 18 + tip.offsetHeight;
      tip.style.left = Math.max(left, 4) + "px";
      tip.style.top = (lower > height ? Math.max(py - tip.offsetHeight - 10, 2) : py + 18) + "px";
    }
    redraw();
  }

  // Pointers: one drags, two pinch, a tap selects.
  const down = new Map();
  let moved = 0;
  const place = (e) => { const r = canvas.getBoundingClientRect(); return { px: e.clientX - r.left, py: e.clientY - r.top }; };
  canvas.addEventListener("pointerdown", (e) => {
    down.set(e.pointerId, place(e));
    canvas.setPointerCapture(e.pointerId);
    moved = 0;
  });
  canvas.addEventListener("pointermove", (e) => {
    const p = place(e), before = down.get(e.pointerId);
    if (!before) return tell(p.px, p.py);
    const others = [...down.entries()].filter(([id]) => id !== e.pointerId).map(([, q]) => q);
    if (others.length) {
      const far = (q) => Math.max(Math.abs(q.px - others[0].px), 8);
      zoom(far(before) / far(p), others[0].px);
    } else {
      const d = (before.px - p.px) / (width - LEFT) * (view.b - view.a);
      show(view.a + d, view.b + d);
      window.scrollBy(0, e.pointerType === "touch" ? before.py - p.py : 0);
    }
    moved += Math.abs(before.px - p.px) + Math.abs(before.py - p.py);
    canvas.classList.add("drag");
    tip.hidden = true;
    down.set(e.pointerId, p);
  });
  const up = (e) => {
    if (down.delete(e.pointerId) && moved < 5 && e.type === "pointerup") {
      const p = place(e);
      tell(p.px, p.py);
      select(hit(p.px, p.py), false);
    }
    canvas.classList.remove("drag");
  };
  canvas.addEventListener("pointerup", up);
  canvas.addEventListener("pointercancel", up);
  canvas.addEventListener("pointerleave", () => { hover = null; tip.hidden = true; redraw(); });
  canvas.addEventListener("wheel", (e) => {
    if (e.shiftKey || Math.abs(e.deltaX) > Math.abs(e.deltaY)) {
      pan((e.deltaX || e.deltaY) / 900);
    } else if (document.activeElement === canvas || e.ctrlKey || e.metaKey || height < window.innerHeight) {
      zoom(Math.exp(Math.max(-60, Math.min(60, e.deltaY)) / 250), place(e).px);
    } else {
      return;
    }
    e.preventDefault();
  }, { passive: false });
  canvas.addEventListener("dblclick", (e) => zoom(.4, place(e).px));

  const dragStrip = (e) => {
    if (!(e.buttons & 1)) return;
    const r = strip.getBoundingClientRect(), at = (e.clientX - r.left) / r.width * end, half = (view.b - view.a) / 2;
    show(at - half, at + half);
  };
  strip.addEventListener("pointerdown", (e) => { strip.setPointerCapture(e.pointerId); dragStrip(e); });
  strip.addEventListener("pointermove", dragStrip);

  function step(by) {
    const inView = ops.findIndex((o) => o.t0 >= view.a);
    const at = sel ? sel.at + by : Math.max(inView, 0);
    if (ops[at]) select(ops[at], true);
  }
  function stepLane(by) {
    if (!sel) return step(0);
    for (let lane = sel.lane + by; lanes[lane]; lane += by) {
      const near = lanes[lane].reduce((best, o) =>
        !best || Math.abs(o.t0 - sel.t0) < Math.abs(best.t0 - sel.t0) ? o : best, null);
      if (near) return select(near, true);
    }
  }
  const KEYS = {
    ArrowLeft: () => pan(-.15), ArrowRight: () => pan(.15), PageUp: () => pan(-.9), PageDown: () => pan(.9),
    ArrowUp: () => stepLane(-1), ArrowDown: () => stepLane(1), "+": () => zoom(.6), "=": () => zoom(.6), "-": () => zoom(1.7),
    "0": fit, Home: () => show(0, view.b - view.a), End: () => show(end - (view.b - view.a), end),
    n: () => step(1), p: () => step(-1), a: () => jump(anomaly + 1), A: () => jump(anomaly < 0 ? -1 : anomaly - 1),
    Escape: () => select(null),
  };
  document.addEventListener("keydown", (e) => {
    const typing = /^(INPUT|BUTTON|SELECT|TEXTAREA)$/.test(e.target.tagName) && !/^[aA]$/.test(e.key);
    if (e.ctrlKey || e.metaKey || e.altKey || typing || e.target.type === "search" || !KEYS[e.key]) return;
    const moves = /^(Arrow|Page|Home|End)/.test(e.key);
    if (moves && e.target !== canvas) return;
    e.preventDefault();
    KEYS[e.key]();
  });

  function fill() {
    const badge = $("badge"), word = D.valid === true ? "valid" : D.valid === false ? "invalid" : "unknown";
    badge.textContent = word.toUpperCase();
    badge.classList.add(word);
    const r = D.results, leaders = D.leaders.length ? ` · ${D.leaders.length} leaders` : "";
    $("figures").textContent = `${time(end, 1e8)} · ${D.total} operations: ${r.ok} ok, ${r.fail} failed, ${r.info} unknown · ` +
      `${D.bands.length} faults${leaders}`;
    if (D.title.replay) {
      const box = $("replay");
      box.hidden = false;
      box.querySelector("code").textContent = D.title.replay;
      box.querySelector("button").onclick = () => navigator.clipboard && navigator.clipboard.writeText(D.title.replay);
    }
    if (isPart) {
      $("part").hidden = false;
      $("part").textContent = `The bars are operations ${D.from + 1} to ${D.from + ops.length} of ${D.total}, ` +
        (D.anomalies.length ? "around the first anomaly" : "around the first fault") + "; the strip below shows the whole run.";
    }
    const first = D.anomalies[0];
    if (first) {
      $("first").hidden = false;
      $("first").append(make("strong", first.check), ` at ${time(first.time)}: ${first.what}`);
    } else {
      ["anomaly", "before", "after"].forEach((id) => { $(id).disabled = true; });
    }
    fillTables();
  }

  function fillTables() {
    const body = $("checks").querySelector("tbody");
    D.checks.forEach((c) => {
      const row = make("tr"), outcome = make("td"), facts = make("td", undefined, "soft");
      outcome.append(make("span", c.outcome, "pill " + c.outcome));
      if (c.count > 1) outcome.append(` ${c.count}${c.count === 100 ? " or more" : ""} violations`);
      if (c.what) outcome.append(make("br"), make("span", c.what, c.outcome === "invalid" ? "wrong" : "soft"));
      facts.textContent = Object.entries(c.facts).map(([name, value]) => `${name} ${value}`).join(" · ");
      row.append(make("td", c.name), outcome, facts);
      body.append(row);
    });
    if (!D.anomalies.length) return;
    $("list").hidden = false;
    D.anomalies.forEach((a, at) => {
      const item = make("li"), button = make("button");
      button.type = "button";
      button.append(make("span", a.check, "wrong"), ` ${time(a.time)} ${a.what}`);
      button.onclick = () => { jump(at); canvas.scrollIntoView({ block: "nearest" }); };
      item.append(button);
      $("list").querySelector("ol").append(item);
    });
  }

  $("anomaly").onclick = () => jump(0);
  $("before").onclick = () => jump(anomaly < 0 ? -1 : anomaly - 1);
  $("after").onclick = () => jump(anomaly + 1);
  $("in").onclick = () => zoom(.6);
  $("out").onclick = () => zoom(1.7);
  $("fit").onclick = fit;
  $("points").onchange = redraw;
  $("find").oninput = () => {
    needle = $("find").value.trim().toLowerCase();
    ops.forEach((o) => {
      o.found = needle && [o.f, o.call, o.answer, o.node, o.error].some((s) => s && String(s).toLowerCase().includes(needle));
    });
    redraw();
  };
  window.addEventListener("resize", redraw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { palette(); redraw(); });
  palette();
  fill();
  width = canvas.clientWidth;
  fit();
  // #first-anomaly and #event-17 open the page at that place.
  const wanted = /^#event-(\d+)$/.exec(location.hash);
  if (location.hash === "#first-anomaly") jump(0);
  if (wanted && byEvent.get(+wanted[1])) {
    const o = byEvent.get(+wanted[1]);
    show(o.t0 - 5e7, stop(o) + 5e7);
    select(o, false);
  }
})();
