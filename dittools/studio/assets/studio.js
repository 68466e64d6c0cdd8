"use strict";
// <dt-player>: clips that play as one, side by side, under a wipe, or as their difference.
// The markup comes from the server; this only makes it move, and works with pictures as well.
class DtPlayer extends HTMLElement {
  // the page changes the markup in place when more clips arrive, so nothing inside is remembered
  get fps() { return Number(this.dataset.fps) || 8; }
  get clips() { return [...this.querySelectorAll("video")]; }
  get lead() { return this.querySelector("video"); }
  get seek() { return this.querySelector("[data-do=seek]"); }
  get wipe() { return this.querySelector(".dt-wipe input"); }
  get last() {
    const seconds = this.lead && this.lead.duration;
    return seconds ? Math.max(0, Math.round(seconds * this.fps) - 1) : 0;
  }
  get frame() {
    return Math.min(this.last, Math.floor(this.lead.currentTime * this.fps + 1e-3));
  }
  connectedCallback() {
    this.playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (!this.listening) this.listen();
    this.listening = true;
    const tick = () => {
      if (!this.isConnected) return;
      this.follow();
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }
  listen() {
    this.addEventListener("click", (event) => this.pressed(event));
    this.addEventListener("input", (event) => {
      if (event.target === this.seek) { this.pause(); this.show(Number(this.seek.value)); }
    });
    this.addEventListener("pointermove", (event) => this.drag(event));
    this.addEventListener("ended", (event) => {
      if (event.target === this.lead && this.playing) { this.show(0); this.play(); }
    }, true);
  }
  follow() {
    const lead = this.lead, seek = this.seek;
    this.style.setProperty("--wipe", `${this.wipe.value}%`);
    this.querySelector(".dt-transport").hidden = !lead;
    if (!lead) return;
    const rate = Number(this.querySelector("[data-do=rate]").value);
    for (const clip of this.clips) {
      if (clip.playbackRate !== rate) clip.playbackRate = rate;
      if (this.playing && clip.paused && !clip.ended) clip.play().catch(() => {});
      const apart = Math.abs(clip.currentTime - lead.currentTime);
      if (this.playing && apart > 0.6 / this.fps && !clip.seeking && clip.readyState > 1) {
        clip.currentTime = lead.currentTime;
      }
    }
    if (Number(seek.max) !== this.last) seek.max = this.last;
    if (document.activeElement !== seek || this.playing) seek.value = this.frame;
    const write = (element, text) => {
      if (element.textContent !== text) element.textContent = text;
    };
    write(this.querySelector("output"), `frame ${this.frame + 1} of ${this.last + 1}`);
    write(this.querySelector("[data-do=play]"), this.playing ? "Pause" : "Play");
  }
  play() {
    this.playing = true;
    for (const clip of this.clips) clip.play().catch(() => {});
  }
  pause() {
    this.playing = false;
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
      if (this.playing) { this.pause(); this.show(this.frame); } else this.play();
    } else if (wanted === "back" || wanted === "next") {
      this.pause();
      const total = this.last + 1;
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
    if (this.dataset.view !== "wipe" || !event.target.closest(".dt-stage")) return;
    if (event.pointerType === "mouse" && event.buttons === 0) return;
    const box = this.querySelector("[data-clip=dense] video, [data-clip=dense] img")
      .getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    this.wipe.value = Math.round(100 * Math.min(1, Math.max(0, share)));
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
