"use strict";
// <dt-player>: clips that play as one, side by side, under a wipe, or as their difference.
// The markup comes from the server; this only makes it move, and works with pictures as well.
class DtPlayer extends HTMLElement {
  connectedCallback() {
    if (this.alive) return;
    this.alive = true;
    this.fps = Number(this.dataset.fps) || 8;
    this.clips = [...this.querySelectorAll("video")];
    this.lead = this.clips[0];
    this.seek = this.querySelector("[data-do=seek]");
    this.toggle = this.querySelector("[data-do=play]");
    this.wipe = this.querySelector(".dt-wipe input");
    this.addEventListener("click", (event) => this.pressed(event));
    this.querySelector("[data-do=rate]").addEventListener("change", (event) => {
      for (const clip of this.clips) clip.playbackRate = Number(event.target.value);
    });
    this.seek.addEventListener("input", () => { this.pause(); this.show(Number(this.seek.value)); });
    this.wipe.addEventListener("input", () => this.cut());
    this.querySelector(".dt-stage").addEventListener("pointermove", (event) => this.drag(event));
    this.cut();
    if (!this.lead) { this.querySelector(".dt-transport").hidden = true; return; }
    this.lead.addEventListener("loadedmetadata", () => this.measure());
    this.lead.addEventListener("ended", () => { this.show(0); this.play(); });
    if (this.lead.readyState > 0) this.measure();
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) this.pause();
    else this.play();
    const tick = () => {
      if (!this.isConnected) { this.alive = false; return; }
      this.follow();
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }
  measure() {
    this.seek.max = Math.max(0, Math.round(this.lead.duration * this.fps) - 1);
  }
  get frame() {
    return Math.min(Number(this.seek.max), Math.floor(this.lead.currentTime * this.fps + 1e-3));
  }
  follow() {
    const playing = !this.lead.paused;
    if (playing) {
      for (const clip of this.clips.slice(1)) {
        if (clip.paused && !clip.ended) clip.play().catch(() => {});
        const apart = Math.abs(clip.currentTime - this.lead.currentTime);
        if (apart > 0.6 / this.fps && !clip.seeking) clip.currentTime = this.lead.currentTime;
      }
    }
    if (document.activeElement !== this.seek || playing) this.seek.value = this.frame;
    const total = Number(this.seek.max) + 1;
    const text = `frame ${this.frame + 1} of ${total}`;
    const out = this.querySelector("output");
    if (out.textContent !== text) out.textContent = text;
    const word = playing ? "Pause" : "Play";
    if (this.toggle.textContent !== word) this.toggle.textContent = word;
  }
  play() {
    for (const clip of this.clips) clip.play().catch(() => {});
  }
  pause() {
    for (const clip of this.clips) clip.pause();
  }
  show(frame) {
    for (const clip of this.clips) clip.currentTime = (frame + 0.5) / this.fps;
  }
  pressed(event) {
    const button = event.target.closest("button");
    if (!button) return;
    const wanted = button.dataset.do;
    if (wanted === "play") {
      if (this.lead.paused) this.play(); else { this.pause(); this.show(this.frame); }
    } else if (wanted === "back" || wanted === "next") {
      this.pause();
      const total = Number(this.seek.max) + 1;
      this.show((this.frame + (wanted === "next" ? 1 : total - 1)) % total);
    } else if (button.dataset.view) {
      this.dataset.view = button.dataset.view;
      for (const other of this.querySelectorAll("[data-view]")) {
        if (other !== this) other.setAttribute("aria-pressed", String(other === button));
      }
      this.querySelector(".dt-wipe").hidden = this.dataset.view !== "wipe";
      const legend = this.querySelector(".dt-legend");
      if (legend) legend.hidden = this.dataset.view !== "difference";
    }
  }
  drag(event) {
    if (this.dataset.view !== "wipe" || (event.pointerType === "mouse" && event.buttons === 0)) return;
    const box = this.querySelector("[data-clip=dense] video, [data-clip=dense] img")
      .getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    this.wipe.value = Math.round(100 * Math.min(1, Math.max(0, share)));
    this.cut();
  }
  cut() {
    this.style.setProperty("--wipe", `${this.wipe.value}%`);
  }
}
if (!customElements.get("dt-player")) customElements.define("dt-player", DtPlayer);

document.addEventListener("click", (event) => {
  const button = event.target.closest(".dt-copy");
  if (!button) return;
  const text = button.closest(".dt-code").querySelector("code").textContent;
  const done = (word) => {
    button.textContent = word;
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
  if (!navigator.clipboard) { done("Select and copy"); return; }
  navigator.clipboard.writeText(text).then(() => done("Copied"), () => done("Select and copy"));
});
