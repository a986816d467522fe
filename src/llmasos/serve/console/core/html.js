/** Preact with htm: what components are written with. */

import htm from "../vendor/htm.js";
import { Component, Fragment, createContext, h, render } from "../vendor/preact.js";

export { Component, Fragment, createContext, h, render };
export {
  useCallback,
  useContext,
  useEffect,
  useErrorBoundary,
  useId,
  useLayoutEffect,
  useMemo,
  useReducer,
  useRef,
  useState,
} from "../vendor/hooks.js";

export const html = htm.bind(h);
