// Shows the images of each case side by side, to be zoomed, moved and windowed together.
"use strict";
(() => {
  const errors = [], told = document.body.dataset;  // what a test of the page reads
  told.errors = "[]";
  addEventListener("error", event => { errors.push(event.message); told.errors = JSON.stringify(errors); });
  const colours = told.palette.match(/.{6}/g), valueOf = new Map(colours.map((hex, i) => [parseInt(hex, 16), i]));
  const clamp = (value, low, high) => Math.min(Math.max(value, low), Math.max(low, high));
  let scrolled = -1e9;  // when the wheel last moved the page
  addEventListener("wheel", event => { if (!event.defaultPrevented) scrolled = event.timeStamp; }, { passive: true });

  // the values of an image, one byte a pixel, and a canvas that holds what is shown of it
  function read(figure) {
    const image = figure.querySelector("img"), scale = Number(figure.dataset.scale);
    const width = image.naturalWidth, height = image.naturalHeight;
    const buffer = Object.assign(document.createElement("canvas"), { width, height });
    const context = buffer.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, width, height), bytes = pixels.data;
    const values = new Uint8Array(width * height).map((_, i) => scale
      ? valueOf.get(bytes[4 * i] << 16 | bytes[4 * i + 1] << 8 | bytes[4 * i + 2]) ?? 0 : bytes[4 * i]);
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", image.alt);
    image.after(canvas);
    image.hidden = true;
    return { canvas, buffer, context, pixels, values, width, height, scale, output: figure.querySelector("output") };
  }

  function open(root) {
    const panels = [...root.querySelectorAll(".panel")].map(read);
    const reduced = Number(root.dataset.reduced), { width, height } = panels[0];
    const boxes = root.dataset.boxes.split(";").filter(Boolean).map(box => box.split(",").map(side => side / reduced));
    const find = name => root.querySelector(name);
    const level = find(".level"), span = find(".window");
    const view = { x: width / 2, y: height / 2, scale: 0 };  // scale: CSS pixels a pixel; x and y: what is in the middle
    let pointer = null, waiting = false, stale = true;  // pointer: CSS pixels off the middle of its panel

    // half of what a panel shows, in pixels of the image
    const half = () => [panels[0].canvas.clientWidth, panels[0].canvas.clientHeight].map(side => side / view.scale / 2);
    const fit = () => Math.min(panels[0].canvas.clientWidth / width, panels[0].canvas.clientHeight / height);
    const request = () => { if (!waiting) { waiting = true; requestAnimationFrame(draw); } };

    function move(right, down) {
      view.x += right / view.scale;
      view.y += down / view.scale;
      request();
    }

    // what lies (right, down) CSS pixels off the middle stays there
    function zoom(factor, right = 0, down = 0) {
      move(right, down);
      view.scale = clamp(view.scale * factor, fit(), 40);
      move(-right, -down);
    }

    function settle() {
      view.scale = clamp(view.scale, fit(), 40);
      const [right, down] = half();
      view.x = 2 * right >= width ? width / 2 : clamp(view.x, right, width - right);
      view.y = 2 * down >= height ? height / 2 : clamp(view.y, down, height - down);
      root.classList.toggle("zoomed", view.scale > fit() * 1.001);
    }

    function applyWindow() {
      const low = level.value - span.value / 2, high = low + Number(span.value);
      const table = new Uint8ClampedArray(256).map((_, i) => 255 * (i / 255 - low) / (high - low));
      for (const { pixels, values, context } of panels.filter(panel => !panel.scale)) {
        const bytes = pixels.data;
        for (let i = 0, j = 0; i < values.length; i++, j += 4) bytes[j] = bytes[j + 1] = bytes[j + 2] = table[values[i]];
        context.putImageData(pixels, 0, 0);
      }
      find(".range").value = `black ${low.toFixed(2)}, white ${high.toFixed(2)}`;
      stale = false;
    }

    function draw() {
      waiting = false;
      if (stale) applyWindow();
      settle();
      const cursor = pointer && { x: view.x + pointer.right / view.scale, y: view.y + pointer.down / view.scale };
      const ratio = devicePixelRatio || 1, scale = view.scale * ratio;
      for (const { canvas, buffer } of panels) {
        const w = Math.round(canvas.clientWidth * ratio), h = Math.round(canvas.clientHeight * ratio);
        Object.assign(canvas, { width: w, height: h });  // clears it, too
        const paper = canvas.getContext("2d");
        // pixels stay squares when they are enlarged
        Object.assign(paper, { imageSmoothingEnabled: scale < 1, imageSmoothingQuality: "high" });
        paper.setTransform(scale, 0, 0, scale, w / 2 - view.x * scale, h / 2 - view.y * scale);
        paper.drawImage(buffer, 0, 0);
        Object.assign(paper, { lineWidth: 1.25 * ratio / scale, strokeStyle: "#ffc400" });
        for (const [row, column, side] of boxes) paper.strokeRect(column, row, side, side);
        if (!cursor) continue;
        paper.strokeStyle = "#4fd0ff";
        paper.beginPath();
        for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]].map(arm => arm.map(step => step * ratio / scale))) {
          paper.moveTo(cursor.x + 2.5 * dx, cursor.y + 2.5 * dy);
          paper.lineTo(cursor.x + 7 * dx, cursor.y + 7 * dy);
        }
        paper.stroke();
      }
      tell(cursor && Math.floor(cursor.y), cursor && Math.floor(cursor.x));
      find(".zoom").value = `${Math.round(100 * scale / reduced)} %`;
    }

    function tell(row, column) {
      const inside = row !== null && column >= 0 && row >= 0 && column < width && row < height;
      find(".place").value = inside ? `row ${row * reduced}, column ${column * reduced}` : "";
      for (const { values, scale, output } of panels) {
        const value = inside ? values[row * width + column] : 0;
        const text = scale ? (value === 255 ? "≥ " : "") + (value / 255 * scale).toFixed(4) : (value / 255).toFixed(3);
        output.value = inside ? text : "";
      }
    }

    function setWindow(middle, range) {
      level.value = middle;
      span.value = range;
      stale = true;
      request();
    }

    // the clean image's range in what is shown
    function automatic() {
      const [right, down] = half(), near = (pixel, middle, reach) => pixel + 1 > middle - reach && pixel < middle + reach;
      const shown = panels[0].values.filter((_, i) => near(i % width, view.x, right)
        && near(Math.floor(i / width), view.y, down)).sort();
      const [low, high] = [0.005, 0.995].map(share => shown[Math.ceil(share * shown.length) - 1] / 255);
      const range = Math.max(high - low, 0.02);
      setWindow(low + range / 2, range);
    }

    const actions = {
      in: () => zoom(1.5),
      out: () => zoom(1 / 1.5),
      one: () => zoom(reduced / (devicePixelRatio || 1) / view.scale),
      fit: () => zoom(1e-9),
      auto: automatic,
      reset: () => setWindow(0.5, 1),
    };
    for (const button of root.querySelectorAll("[data-do]")) button.addEventListener("click", actions[button.dataset.do]);
    for (const slider of [level, span]) slider.addEventListener("input", () => { stale = true; request(); });

    const keys = { "+": "in", "=": "in", "-": "out", "1": "one", "f": "fit", "F": "fit", "0": "fit" };
    const arrows = { ArrowLeft: [-40, 0], ArrowRight: [40, 0], ArrowUp: [0, -40], ArrowDown: [0, 40] };
    root.addEventListener("keydown", event => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "INPUT") return;
      if (keys[event.key]) actions[keys[event.key]]();
      else if (arrows[event.key] && root.classList.contains("zoomed")) move(...arrows[event.key]);
      else return;
      event.preventDefault();
    });

    const fingers = new Map();
    for (const { canvas } of panels) {
      const listen = (names, done) => names.forEach(name => canvas.addEventListener(name, done, { passive: false }));
      const off = event => {
        const box = canvas.getBoundingClientRect();
        return { right: event.clientX - box.left - box.width / 2, down: event.clientY - box.top - box.height / 2 };
      };
      listen(["wheel"], event => {
        const outwards = event.deltaY > 0 && !root.classList.contains("zoomed");
        // a page on the move goes on moving
        if (!event.ctrlKey && (outwards || event.timeStamp - scrolled < 300)) return;
        event.preventDefault();
        const { right, down } = off(event), lines = event.deltaMode ? 30 : 1;
        zoom(Math.exp(-clamp(event.deltaY * lines, -250, 250) / 400), right, down);
      });
      listen(["pointerdown"], event => {
        fingers.set(event.pointerId, off(event));
        canvas.setPointerCapture(event.pointerId);
        canvas.classList.add("moving");
      });
      listen(["pointermove"], event => {
        const now = off(event), before = fingers.get(event.pointerId);
        pointer = now;
        request();
        if (!before) return;
        move((before.right - now.right) / fingers.size, (before.down - now.down) / fingers.size);
        const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
        if (other) {
          const apart = finger => Math.hypot(finger.right - other.right, finger.down - other.down) || 1;
          zoom(apart(now) / apart(before), (now.right + other.right) / 2, (now.down + other.down) / 2);
        }
        fingers.set(event.pointerId, now);
      });
      listen(["pointerup", "pointercancel"], event => {
        fingers.delete(event.pointerId);
        canvas.classList.remove("moving");
      });
      listen(["pointerleave"], () => { pointer = null; request(); });
      listen(["dblclick"], event => zoom(3, off(event).right, off(event).down));
    }

    root.parentElement.querySelectorAll(".show").forEach((button, i) => {
      const [row, column, side] = boxes[i], { canvas } = panels[0];
      button.hidden = false;
      button.addEventListener("click", () => {
        const scale = Math.min(canvas.clientWidth, canvas.clientHeight) / side / 2;
        Object.assign(view, { scale, x: column + side / 2, y: row + side / 2 });
        request();
        root.scrollIntoView({ block: "nearest" });
      });
    });

    find(".controls").hidden = false;
    new ResizeObserver(request).observe(panels[0].canvas);
    draw();
  }

  addEventListener("load", () => {
    document.querySelectorAll(".viewer").forEach(open);
    told.panels = document.querySelectorAll(".panel canvas").length;
    told.ready = "1";
  });
})();
