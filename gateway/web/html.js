// Preact and htm under one name: `html` makes elements from a template, without a build step.
import { h, render, Fragment } from "./vendor/preact/preact.js";
import htm from "./vendor/htm/htm.js";

export { render, Fragment };
export {
  useCallback,
  useEffect,
  useLayoutEffect,
  useMemo,
  useRef,
  useState,
} from "./vendor/preact/hooks.js";
export const html = htm.bind(h);
