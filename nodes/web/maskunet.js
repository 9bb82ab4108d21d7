// The look of the nodes. Without this file all of them work the same.
//
// An input with the option `shown_with: {other: value}` is shown while the widget `other` has that value. What is hidden
// keeps its value, and is saved and sent all the same.
import { app } from "../../scripts/app.js";

const LEAST_WIDTH = 280; // of a new node: titles, labels and names of files are not cut.

function conditionsOf({ input }) {
    const every = Object.entries({ ...input?.required, ...input?.optional });
    return every.flatMap(([name, [, options]]) => (options?.shown_with ? [[name, options.shown_with]] : []));
}

function update(node, conditions) {
    const widget = (name) => node.widgets?.find((candidate) => candidate.name === name);
    const linked = (name) => node.inputs?.some((slot) => slot.widget?.name === name && slot.link != null);
    const before = node.computeSize()[1];
    for (const [name, others] of conditions) {
        const found = widget(name);
        if (!found) continue;
        const matches = Object.entries(others).every(([other, value]) => widget(other)?.value === value);
        found.hidden = !matches && !linked(name);
        found.options.hidden = found.hidden;
    }
    return node.computeSize()[1] - before;
}

app.registerExtension({
    name: "MaskUNet.Look",
    nodeCreated(node) {
        if (node.comfyClass?.startsWith("MaskUNet") && node.size[0] < LEAST_WIDTH) {
            node.setSize([LEAST_WIDTH, node.size[1]]);
        }
    },
    beforeRegisterNodeDef(nodeType, definition) {
        const conditions = conditionsOf(definition);
        if (!conditions.length) return;
        const { onNodeCreated, onConfigure } = nodeType.prototype;
        nodeType.prototype.onNodeCreated = function (...values) {
            onNodeCreated?.apply(this, values);
            for (const other of new Set(conditions.flatMap(([, others]) => Object.keys(others)))) {
                const chooser = this.widgets?.find(({ name }) => name === other);
                if (!chooser) continue;
                const { callback } = chooser;
                chooser.callback = (...values) => {
                    callback?.apply(chooser, values);
                    this.setSize([this.size[0], this.size[1] + update(this, conditions)]);
                };
            }
            update(this, conditions);
            this.setSize([this.size[0], this.computeSize()[1]]);
        };
        nodeType.prototype.onConfigure = function (...values) {
            onConfigure?.apply(this, values);
            update(this, conditions);
        };
    },
});
