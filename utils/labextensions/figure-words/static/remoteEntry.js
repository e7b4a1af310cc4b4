// Draws PNG figures in JupyterLab as it does itself, and gives them the alternative text that their metadata hold,
// which JupyterLab 4.6 leaves out. A prebuilt extension, written by hand: nothing has to be built or installed.
{
  const mimeType = "image/png";
  let shared;
  const load = async (name) => (await Object.values(shared[name])[0].get())();

  async function extension() {
    const { Widget } = await load("@lumino/widgets");
    class Picture extends Widget {
      constructor() {
        super();
        this.addClass("jp-RenderedImage");
      }
      async renderModel(model) {
        const { alt, width, height, unconfined } = model.metadata[mimeType] ?? {};
        const picture = document.createElement("img");
        picture.src = `data:${mimeType};base64,${model.data[mimeType]}`;
        for (const [name, value] of Object.entries({ alt, width, height })) if (value) picture[name] = value;
        const behind = model.metadata.needs_background;
        if (behind) picture.classList.add(`jp-needs-${behind}-background`);
        picture.classList.toggle("jp-mod-unconfined", unconfined === true);
        this.node.replaceChildren(picture);
      }
    }
    const rendererFactory = { safe: true, mimeTypes: [mimeType], createRenderer: () => new Picture() };
    return { id: "figure-words:png", rendererFactory, rank: 90, dataType: "string" };
  }

  window._JUPYTERLAB = window._JUPYTERLAB ?? {};
  window._JUPYTERLAB["figure-words"] = {
    init: async (scope) => { shared = scope; },
    get: async () => {
      const found = await extension().catch(() => []);   // where JupyterLab is built in another way: as without it
      return () => ({ __esModule: true, default: found });
    },
  };
}
