// Browsers give no worker to a page from file://, which the search asks for: there its script runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      const page = this.inside.document;
      page.open();
      page.write("<body></body>");
      page.close();
      this.inside.postMessage = data => this.answer(data);
      this.inside.importScripts = async (...urls) => { for (const each of urls) await this.load(each); };
      this.ready = this.load(url);
    }
    load(url) {
      return new Promise(done => {
        const script = this.inside.document.createElement("script");
        script.onload = done;
        script.src = url;
        this.inside.document.body.append(script);
      });
    }
    answer(data) {
      const event = new MessageEvent("message", {data});
      this.dispatchEvent(event);
      this.onmessage?.(event);
    }
    postMessage(data) {
      this.ready = this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", {data})));
    }
    terminate() {
      this.inside.frameElement?.remove();
    }
  };
}
