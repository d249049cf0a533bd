/* Browsers start no worker from a file. Where the site is read from a disk, the search runs in a
   hidden frame instead, which has the few words of a worker that it uses. */
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.title = "search";
      document.documentElement.append(frame);
      this.frame = frame;
      const inside = frame.contentWindow;
      inside.postMessage = (data) => setTimeout(() => this.onmessage?.({ data }));
      const script = frame.contentDocument.createElement("script");
      script.src = new URL(url, location.href);
      script.onload = () => {
        this.ready = true;
        for (const data of this.waiting.splice(0)) this.postMessage(data);
      };
      script.onerror = (error) => this.onerror?.(error);
      frame.contentDocument.head.append(script);
    }

    postMessage(data) {
      if (this.ready) this.frame.contentWindow.onmessage({ data });
      else this.waiting.push(data);
    }

    terminate() {
      this.frame.remove();
    }
  };
}
