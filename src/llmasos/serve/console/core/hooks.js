/** Asking the server from components. */

import { toast } from "../components/toast.js";
import { AbortError, errorText, key } from "./api.js";
import { useCallback, useEffect, useRef, useState } from "./html.js";
import { useSignal } from "./store.js";

/** What `load(signal)` gives, now and whenever `deps` change: {data, error, loading, reload}. Old data stays while new loads. */
export function useLoad(load, deps = []) {
  const [state, setState] = useState({ data: undefined, error: null, loading: true });
  const [round, setRound] = useState(0);
  const inForce = useSignal(key); // another key sees other things
  useEffect(() => {
    const controller = new AbortController();
    setState((old) => ({ ...old, loading: true }));
    load(controller.signal).then(
      (data) => controller.signal.aborted || setState({ data, error: null, loading: false }),
      (error) =>
        controller.signal.aborted || error instanceof AbortError || setState((old) => ({ ...old, error, loading: false })),
    );
    return () => controller.abort();
  }, [...deps, round, inForce]);
  const reload = useCallback(() => setRound((n) => n + 1), []);
  return { ...state, reload };
}

/** As `useLoad`, and again `ms` after each answer while the page is visible. */
export function usePoll(load, ms, deps = []) {
  const state = useLoad(load, deps);
  useEffect(() => {
    if (state.loading) return undefined;
    let timer = setTimeout(next, ms);
    function next() {
      if (document.hidden) timer = setTimeout(next, ms);
      else state.reload();
    }
    return () => clearTimeout(timer);
  }, [state.loading, state.data, state.error, ms]);
  return state;
}

/** [run, busy]: `run` calls `work`, and what it throws is shown as a toast. */
export function useAction(work) {
  const [busy, setBusy] = useState(false);
  const alive = useRef(true);
  useEffect(() => () => void (alive.current = false), []);
  const run = async (...args) => {
    setBusy(true);
    try {
      return await work(...args);
    } catch (e) {
      if (!(e instanceof AbortError)) toast(errorText(e), { tone: "bad" });
      return undefined;
    } finally {
      if (alive.current) setBusy(false);
    }
  };
  return [run, busy];
}
