/* Browsers start no workers for pages that were opened from the disk. There the search runs in a hidden frame. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = []; // messages until the script runs
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.srcdoc = "";
      this.frame.addEventListener("load", () => this.start(url), {once: true});
      document.body.append(this.frame);
    }

    start(url) {
      const inside = this.frame.contentWindow;
      const load = (src) => new Promise((done) => {
        const script = inside.document.createElement("script");
        script.addEventListener("load", done);
        script.src = src;
        inside.document.body.append(script);
      });
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", {data}));
      inside.importScripts = (...files) => Promise.all(files.map(load));
      load(url).then(() => {
        this.postMessage = (data) => inside.dispatchEvent(new inside.MessageEvent("message", {data}));
        this.waiting.forEach(this.postMessage);
      });
    }

    postMessage(data) {
      this.waiting.push(data);
    }
  };
}
